"""Signals of a scheduler: noted, obeyed between two steps or when time is up, and gone afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_orz.checkpoint.preemption import Preemption
from megatron_orz.ranks import Ranks

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


def run(body: Callable[[Preemption], None], said: list[str], *, grace_s: float = 60) -> None:
    with Preemption(Ranks(), grace_s=grace_s, say=said.append) as preemption:
        body(preemption)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_stops_the_run_when_the_run_asks(number: signal.Signals) -> None:
    def two_signals(preemption: Preemption) -> None:
        assert not preemption.is_requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert preemption.is_requested()
        preemption.stop()

    said: list[str] = []
    with pytest.raises(SystemExit, match="75"):
        run(two_signals, said)
    assert said == ["stopped by a signal after a checkpoint; the same command goes on from it"]


def test_a_step_that_takes_too_long_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    def too_long(preemption: Preemption) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)

    timer = signal.setitimer(signal.ITIMER_REAL, 0)  # of pytest-timeout
    with pytest.raises(SystemExit, match="75"):
        run(too_long, [], grace_s=0.05)
    signal.setitimer(signal.ITIMER_REAL, *timer)
    assert "the step did not end within 0.05 s" in capfd.readouterr().err


def test_what_fails_after_a_signal_ends_with_the_code_for_requeueing() -> None:
    def lose_the_server(preemption: Preemption) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the server ended")

    said: list[str] = []
    with pytest.raises(SystemExit, match="75"):
        run(lose_the_server, said)
    assert said == ["stopped by SIGTERM; the step that was under way failed: the server ended"]


def test_what_fails_without_a_signal_stays_what_it_is() -> None:
    def fail(preemption: Preemption) -> None:
        raise RuntimeError("no signal")

    with pytest.raises(RuntimeError, match="no signal"):
        run(fail, [])
