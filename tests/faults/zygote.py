"""Forks training runs from a process that has imported everything, and kills them where a plan says.

    with Zygote() as zygote:
        end = zygote.run(recipe, place, KillAt("policy:start", 2))

A run is a real one: `train.main` with its command line, checkpoints, processes and exit code. Only its rewards are made
up, because a model with random weights earns none: the answer that is compared is a digit drawn from the text.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE_S = 300
"""Of one run."""
STRAGGLERS_S = 30
"""How long the other ranks may outlive one that was killed."""


@dataclass(frozen=True)
class Plan:
    """Where a run is killed: rank `rank` at the `count`-th time it reaches `point`, or after `seconds`.

    At the point `verifier` it is one of its verifier processes that is killed, before it compares.
    """

    point: str | None = None
    count: int = 1
    seconds: float | None = None
    rank: int = 0
    whole_tree: bool = False
    """All ranks at once, where `seconds` says when."""
    signal: int = signal.SIGKILL
    """What is sent at `point` instead."""
    stall_s: float = 0
    """How long the run then stays there."""


NEVER = Plan()


@dataclass(frozen=True)
class End:
    """How a run ended."""

    exit_codes: list[int]
    """Of each rank; -9 for one that was killed."""
    said: str
    seconds: float

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.exit_codes


class Zygote:
    """A context manager around the process that forks."""

    num_kills = 0
    """Runs that it has killed."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=DEADLINE_S)

    def run(
        self,
        recipe: Path,
        place: Path,
        plan: Plan = NEVER,
        *,
        arguments: Sequence[str] = (),
        world_size: int = 1,
        stand_ins: dict[str, float] | None = None,
    ) -> End:
        """Runs the recipe in `place`, which is its working directory, until it ends or is killed.

        stand_ins: faults of the stand-ins in place of vLLM's servers (`tests/rollout/stand_in.py`); None: vLLM's own
        servers, if the run has any.
        """
        request = {
            "recipe": str(recipe),
            "place": str(place),
            "plan": asdict(plan),
            "arguments": list(arguments),
            "world_size": world_size,
            "stand_ins": stand_ins,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote died"
        end = End(**json.loads(answer))
        self.num_kills += end.was_killed
        return end


def main() -> None:
    """Serves requests, one after another."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import megatron_orz.train  # noqa: F401
    import tests.rollout.stand_in_fleet  # noqa: F401
    from megatron_orz.engine import megatron_engine  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints must not be taken for an answer
    for line in sys.stdin:
        answers.write(json.dumps(_fork_and_wait(json.loads(line))) + "\n")
        answers.flush()


def _fork_and_wait(request: dict[str, Any]) -> dict[str, Any]:
    from megatron_orz.rollout.servers import free_port

    place, plan, world_size = Path(request["place"]), Plan(**request["plan"]), request["world_size"]
    place.mkdir(parents=True, exist_ok=True)
    said, port = place / "said", free_port()
    said.write_text("")
    start = time.monotonic()
    ranks = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _run(request, plan, rank, port, said)
        ranks[pid] = rank
    exit_codes: dict[int, int] = {}
    victims = [pid for pid, rank in ranks.items() if plan.whole_tree or rank == plan.rank]
    deadline = start + DEADLINE_S
    while ranks.keys() - exit_codes.keys():
        for pid in ranks.keys() - exit_codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                exit_codes[pid] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + STRAGGLERS_S)
        if plan.seconds is not None and time.monotonic() - start > plan.seconds:
            for pid in victims:
                if pid not in exit_codes:
                    os.kill(pid, signal.SIGKILL)
            plan = NEVER
        if time.monotonic() > deadline:
            for pid in ranks.keys() - exit_codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {
        "exit_codes": [exit_codes[pid] for pid in ranks],
        "said": said.read_text(),
        "seconds": time.monotonic() - start,
    }


def _run(request: dict[str, Any], plan: Plan, rank: int, port: int, said: Path) -> None:
    """One rank of a run, in a forked process that it does not leave."""
    code = 1
    try:
        os.chdir(request["place"])
        output = os.open(said, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if request["world_size"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(request["world_size"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        _make_up_rewards(as_fractions=plan.point == "verifier")
        _trace_prompts(Path(f"trace-{rank}.jsonl"))
        _trace_requests(Path("requests.jsonl"))
        if request["stand_ins"] is not None:
            _use_stand_ins(request["stand_ins"])
        if plan.point is not None and rank == plan.rank:
            _kill_verifier(plan.count) if plan.point == "verifier" else _kill_at(plan)
        sys.argv = [request["recipe"], *request["arguments"]]
        runpy.run_path(request["recipe"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _make_up_rewards(*, as_fractions: bool) -> None:
    """as_fractions: the same rewards, but a verifier process has to find them."""
    from megatron_orz.rewards import math_answer

    form = "\\frac{{{}}}{{1}}" if as_fractions else "{}"
    math_answer.extract_answer = lambda text: form.format(zlib.crc32(text.encode()) % 3)


def _kill_verifier(count: int) -> None:
    from megatron_orz.rewards.math_answer import _Worker

    compare, calls, is_done = _Worker.compare, itertools.count(1), False

    def after_a_kill(self: Any, answer: str, reference: str) -> bool | None:
        nonlocal is_done
        if not is_done and next(calls) >= count and self._process is not None:
            is_done = True
            print("verifier process killed", flush=True)
            self._process.kill()
            self._process.wait()
        return compare(self, answer, reference)

    setattr(_Worker, "compare", after_a_kill)  # noqa: B010


def _trace_prompts(file: Path) -> None:
    """Notes which prompts are answered with which seed, for every call that begins."""
    from megatron_orz.rollout.local import LocalFleet

    generate = LocalFleet.generate

    def noted(self: Any, prompts: Any, *, seed: int, **options: Any) -> Any:
        with file.open("a") as stream:
            stream.write(json.dumps([seed, [prompt.prompt_id for prompt in prompts]]) + "\n")
        return generate(self, prompts, seed=seed, **options)

    setattr(LocalFleet, "generate", noted)  # noqa: B010


def _trace_requests(file: Path) -> None:
    """Notes every request for rollouts to train on, when it goes out to a server: its id and its prompt."""
    from megatron_orz.rollout.client import ServerClient

    respond = ServerClient.respond

    def noted(self: Any, http: Any, request: Any) -> Any:
        if request.prompt.source == "train.jsonl":
            with file.open("a") as stream:
                stream.write(json.dumps([request.request_id, request.prompt.prompt_id]) + "\n")
        return respond(self, http, request)

    setattr(ServerClient, "respond", noted)  # noqa: B010


def _use_stand_ins(faults: dict[str, float]) -> None:
    from megatron_orz.rollout import fleet, kinds
    from megatron_orz.rollout.servers import free_port
    from tests.rollout.stand_in_fleet import VersionSender, stand_in_launch

    setattr(kinds, "vllm_launch", lambda *args, **options: stand_in_launch(free_port(), **faults))  # noqa: B010
    setattr(fleet, "weight_sender", lambda *args, **options: VersionSender)  # noqa: B010


PHASES = ("sync", "evaluate", "generate", "reward", "infer", "critic", "policy", "checkpoint")
CALLS = {
    "row": ("megatron_orz.log_files", "LineFile.append"),
    "event": ("megatron_orz.log_files", "EventFile.append"),
    "update": ("megatron_orz.engine.megatron_engine", "MegatronEngine.step"),
    "step-end": ("megatron_orz.checkpoint.step_end", "StepEnd.__call__"),
    "save": ("megatron_orz.checkpoint.store", "CheckpointStore.save"),
    "snapshot": ("megatron_orz.engine.megatron_engine", "MegatronEngine.save_state"),
    "write": ("megatron_orz.engine.training_state", "PendingSave.write"),
    "describe": ("megatron_orz.engine.training_state", "PendingSave.finish"),
    "commit": ("megatron_orz.checkpoint.store", "CheckpointStore._commit"),
    "manifest": ("megatron_orz.checkpoint.manifest", "Manifest.write"),
    "rename": ("pathlib", "Path.rename"),
    "latest": ("pathlib", "Path.symlink_to"),
    "thin-out": ("megatron_orz.checkpoint.directory", "CheckpointDirectory.thin_out"),
    "remove": ("shutil", "rmtree"),
    "restore": ("megatron_orz.checkpoint.store", "CheckpointStore.restore"),
    "final": ("megatron_orz.checkpoint.hf_export", "_write_shards"),
}
"""Functions whose beginning and end are points of a run."""
POINTS = [f"{name}:{edge}" for name in (*PHASES, *CALLS) for edge in ("start", "end")]


def _kill_at(plan: Plan) -> None:
    remaining = plan.count

    def reach(name: str) -> None:
        nonlocal remaining
        if name == plan.point:
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), plan.signal)
                time.sleep(plan.stall_s)

    import importlib

    from megatron_orz.logs import RunLog

    for name, (module_name, path) in CALLS.items():
        owner: Any = importlib.import_module(module_name)
        *outer, attribute = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, attribute, _between(getattr(owner, attribute), name, reach))
    span = RunLog.span

    @contextmanager
    def noted(self: RunLog, name: str) -> Iterator[None]:
        with span(self, name):
            reach(f"{name}:start")
            yield
            reach(f"{name}:end")

    setattr(RunLog, "span", noted)  # noqa: B010


def _between(function: Callable[..., Any], name: str, reach: Callable[[str], None]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        reach(f"{name}:start")
        result = function(*args, **options)
        reach(f"{name}:end")
        return result

    return called


def random_plan(generator: random.Random, seconds: float, world_size: int) -> Plan:
    """A kill at any moment of a run that takes so long."""
    return Plan(
        seconds=generator.uniform(0, seconds),
        rank=generator.randrange(world_size),
        whole_tree=generator.random() < 0.5,
    )


if __name__ == "__main__":
    main()
