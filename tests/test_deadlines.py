"""No wait without a deadline, as far as that can be read from the source. docs/hangs.md lists them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_security import ROOT, called, is_given, sources

NEED_TIMEOUT = {
    *("subprocess.run", "subprocess.check_call", "subprocess.check_output"),
    *("httpx.get", "httpx.post", "socket.create_connection", "dist.TCPStore", "dist.init_process_group"),
}

FILES = "the system gives the writing of files no deadline; the watchdog ends a run that hangs there"
GROUP = "a collective has the deadline of its group"
BOUNDED: dict[str, dict[str, str]] = {
    "megatron_orz/engine/weights.py": {"hop.wait": GROUP},
    "megatron_orz/ops/token_loss.py": {"reduction.wait": GROUP},
    "megatron_orz/rollout/gloo_transport.py": dict.fromkeys(("part.wait", "send.wait"), GROUP),
    "megatron_orz/rollout/nccl_transport.py": {".wait": GROUP},
    "megatron_orz/rollout/sglang_group.py": {".wait": GROUP},
    "megatron_orz/rollout/replica.py": {"self._has_memory.wait": "set at the trainer's next hand-over, or cancelled"},
    "megatron_orz/rewards/math_answer.py": {"self._idle.get": "a process is given back after its own deadline"},
    "megatron_orz/checkpoint/step_end.py": {"self.store.wait": FILES},
    "megatron_orz/checkpoint/store.py": dict.fromkeys(("self.wait", "self._save.thread.join"), FILES),
    "megatron_orz/engine/training_state.py": {"outcomes.get": "what it gets is there: the call before put it there"},
}
"""Waits whose deadline stands elsewhere: file -> call -> where."""


def endless_waits(path: str, source: str) -> Iterator[str]:
    """Calls that may wait for ever."""
    allowed = BOUNDED.get(path, {})
    bounded_here: set[ast.AST] = set()  # a walk comes to the block around before it comes to the call within
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            entered = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            if any(called(call) == "FileLock" and not is_given(call, "timeout") for call in entered):
                yield f"line {node.lineno}: a lock is waited for without a timeout"
        if isinstance(node, ast.AsyncWith):
            entered = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            if any(called(call) == "asyncio.timeout" and call.args for call in entered):
                bounded_here |= set(ast.walk(node))
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name in allowed or node in bounded_here:
            continue
        if (name in NEED_TIMEOUT and not is_given(node, "timeout")) or name == "os.wait":
            yield f"line {node.lineno}: {name} has no timeout"
        if any(
            k.arg == "timeout" and isinstance(k.value, ast.Constant) and k.value.value is None for k in node.keywords
        ):
            yield f"line {node.lineno}: {name} has timeout None"
        is_bare = not node.args and not node.keywords
        if is_bare and name.rpartition(".")[2] in ("wait", "join", "get", "communicate", "acquire"):
            yield f"line {node.lineno}: {name}() has no deadline"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_wait_has_a_deadline(path: Path) -> None:
    assert list(endless_waits(str(path.relative_to(ROOT)), path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['ls'])",
        "with FileLock(path):\n    pass",
        "httpx.get(url)",
        "httpx.get(url, timeout=None)",
        "process.wait()",
        "thread.join()",
        "queue.get()",
        "process.communicate()",
        "lock.acquire()",
        "async def look():\n    async with asyncio.timeout():\n        await event.wait()",
        "dist.TCPStore('127.0.0.1', 0)",
    ],
)
def test_an_endless_wait_is_found(source: str) -> None:
    assert list(endless_waits("megatron_orz/some.py", source))


def test_harmless_namesakes_pass() -> None:
    source = "', '.join(names)\nvalues.get(key)\nprocess.wait(5)\nsubprocess.run(['ls'], timeout=5)"
    source += "\nasync def look():\n    async with asyncio.timeout(5):\n        await event.wait()"
    assert list(endless_waits("megatron_orz/some.py", source)) == []
