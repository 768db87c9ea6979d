"""Made problems: the answer of each is checked by solving what the question says, another way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations, product

import pytest

from megatron_orz.data.generators.catalogue import TASKS, make
from megatron_orz.data.generators.countdown import reachable
from megatron_orz.data.generators.logic import NAMES


def every_value(numbers: tuple[int, ...]) -> Iterator[int]:
    """What can be made of all the numbers, by replacing two of them with a result until one is left."""
    if len(numbers) == 1:
        yield numbers[0]
        return
    for a, b, *rest in permutations(numbers):
        results = {a + b, a * b, a - b if a > b else 0, a // b if a % b == 0 else 0}
        for result in results - {0}:
            yield from every_value((result, *rest))


def solve_arithmetic(question: str) -> str:
    expression = re.fullmatch(r"Compute \$([-+*() \d]+)\$\.", question)
    assert expression
    return str(eval(expression[1]))


def solve_countdown(question: str) -> str:
    *numbers, limit = map(int, re.findall(r"\d+", question))
    return str(max(value for value in set(every_value(tuple(numbers))) if value <= limit))


def is_true(statement: str, speaker: int, knights: dict[str, bool]) -> bool:
    if match := re.fullmatch(r"(\w+) is a (knight|knave)\.", statement):
        return knights[match[1]] == (match[2] == "knight")
    if match := re.fullmatch(r"(\w+) and I are of (the same kind|different kinds)\.", statement):
        return (knights[match[1]] is knights[NAMES[speaker]]) is (match[2] == "the same kind")
    if match := re.fullmatch(r"The number of knights among us is (\d+)\.", statement):
        return list(knights.values()).count(True) == int(match[1])
    match = re.fullmatch(r"If (\w+) is a (knight|knave), then (\w+) is a (knight|knave)\.", statement)
    assert match, statement
    premise, conclusion = (knights[match[n]] == (match[n + 1] == "knight") for n in (1, 3))
    return conclusion if premise else True


def solve_logic(question: str) -> str:
    said = re.findall(r'(\w+) says: "(.*)"', question)
    names = [name for name, _ in said]
    assert names == list(NAMES[: len(names)])
    solutions = [
        digits
        for digits in product("01", repeat=len(names))
        if all(
            (digits[speaker] == "1")
            == is_true(text, speaker, {name: d == "1" for name, d in zip(names, digits, strict=True)})
            for speaker, (_, text) in enumerate(said)
        )
    ]
    assert len(solutions) == 1, "one answer and no other"
    return "".join(solutions[0])


SOLVERS = {"arithmetic": solve_arithmetic, "countdown": solve_countdown, "logic": solve_logic}


@pytest.mark.parametrize(
    ("task", "level", "num_problems"),
    [
        *(("arithmetic", level, 30) for level in range(1, 9)),
        *(("countdown", level, number) for level, number in ((1, 30), (2, 10), (3, 1))),
        *(("logic", level, 20) for level in range(1, 7)),
    ],
)
def test_answers_solve_their_questions(task: str, level: int, num_problems: int) -> None:
    problems = list(make(task, level=level, num_problems=num_problems, seed=3))
    assert [problem.answer for problem in problems] == [SOLVERS[task](problem.question) for problem in problems]
    assert len({problem.question for problem in problems}) == num_problems


@pytest.mark.parametrize("task", TASKS)
def test_problems_depend_on_seed_and_level_and_not_on_their_number(task: str) -> None:
    first = list(make(task, level=2, num_problems=12, seed=0))
    assert list(make(task, level=2, num_problems=5, seed=0)) == first[:5]
    assert list(make(task, level=2, num_problems=12, seed=1)) != first
    assert len({problem.answer for problem in first}) > 3


@pytest.mark.parametrize("task", TASKS)
def test_higher_levels_ask_for_more(task: str) -> None:
    def mean_length(level: int) -> float:
        return sum(len(problem.question) for problem in make(task, level=level, num_problems=20, seed=0)) / 20

    lengths = [mean_length(level) for level in range(1, TASKS[task].max_level + 1)]
    assert lengths == sorted(lengths)


def test_reachable_numbers_are_those_of_replacing_pairs() -> None:
    for numbers in ((2,), (3, 5), (7, 7), (1, 1, 2), (2, 3, 4), (3, 8, 8, 12), (1, 5, 5, 25)):
        assert reachable(numbers) == set(every_value(numbers))


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task 'chess' is none of arithmetic, countdown, logic"):
        make("chess", level=1, num_problems=1, seed=0)
    with pytest.raises(ValueError, match=r"level 9 is outside \[1, 8\]"):
        list(make("arithmetic", level=9, num_problems=1, seed=0))
    with pytest.raises(ValueError, match=r"only 243 different problems of level 1 were found and 300 asked for; raise"):
        list(make("arithmetic", level=1, num_problems=300, seed=0))


def test_reasoning_gym_is_a_source_where_it_is_installed() -> None:
    pytest.importorskip("reasoning_gym")
    problems = list(make("reasoning-gym:chain_sum", level=1, num_problems=5, seed=0))
    assert len(problems) == 5
    for problem in problems:
        expression = re.search(r"[-+\d ]*\d [-+] [-+\d ]*\d", problem.question)
        assert expression
        assert eval(expression[0]) == int(problem.answer)
    with pytest.raises(ValueError, match=r"no curriculum named 'chess'"):
        list(make("reasoning-gym:chess", level=1, num_problems=5, seed=0))
    with pytest.raises(ValueError, match=r"level 99 is outside"):
        list(make("reasoning-gym:chain_sum", level=99, num_problems=5, seed=0))


def test_reasoning_gym_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match=r"reasoning-gym cannot be imported .*; run pip install reasoning-gym"):
        list(make("reasoning-gym:chain_sum", level=1, num_problems=5, seed=0))
