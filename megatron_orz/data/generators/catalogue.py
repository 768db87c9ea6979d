"""All generators by name."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_orz.data.generators.arithmetic import ARITHMETIC
from megatron_orz.data.generators.countdown import COUNTDOWN
from megatron_orz.data.generators.logic import LOGIC
from megatron_orz.data.generators.task import Made, Task

TASKS: dict[str, Task] = {"arithmetic": ARITHMETIC, "countdown": COUNTDOWN, "logic": LOGIC}
REASONING_GYM = "reasoning-gym:"
"""Before the name of a data set of that library, such as `reasoning-gym:chain_sum`."""


def make(task: str, *, level: int, num_problems: int, seed: int) -> Iterator[Made]:
    """Problems of a task. Raises ValueError when there is no such task or level, or too few different problems."""
    if task.startswith(REASONING_GYM):
        return _from_reasoning_gym(task.removeprefix(REASONING_GYM), level, num_problems, seed)
    if task not in TASKS:
        raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}; give one of them, or {REASONING_GYM}NAME")
    return TASKS[task].make(level=level, num_problems=num_problems, seed=seed)


def _from_reasoning_gym(name: str, level: int, num_problems: int, seed: int) -> Iterator[Made]:
    """Problems of the library's curriculum. Some have answers that only its own scoring can check: curate them."""
    try:
        from reasoning_gym.factory import CURRICULA, create_curriculum, create_dataset
    except ImportError as error:
        raise ValueError(f"reasoning-gym cannot be imported ({error}); run pip install reasoning-gym") from error
    if name not in CURRICULA:
        raise ValueError(f"reasoning-gym has no curriculum named {name!r}; give one of {', '.join(sorted(CURRICULA))}")
    curriculum = create_curriculum(name)
    max_level = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=1)
    if not 1 <= level <= max_level:
        raise ValueError(f"level {level} is outside [1, {max_level}], the levels of {name!r}")
    curriculum.set_global_level(level - 1)
    config = curriculum.generate_configuration({"seed": seed, "size": num_problems})
    for entry in create_dataset(name, **vars(config)):
        yield Made(question=entry["question"], answer=str(entry["answer"]))
