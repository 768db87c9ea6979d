"""Simulated servers against closed forms, and against a loop over single iterations."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import simpy

from megatron_orz.simulation.profile import Decoding
from megatron_orz.simulation.servers import SimulatedFleet, generation_seconds


def iterate(decoding: Decoding, groups: Sequence[Sequence[int]]) -> float:
    """Seconds of one server, iteration by iteration: every running response gains a token in each."""
    waiting = [length for group in groups for length in group]
    running: list[int] = []
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < decoding.max_running:
            running.append(waiting.pop(0))
        seconds += decoding.iteration_s + len(running) * decoding.response_s
        running = [left - 1 for left in running if left > 1]
    return seconds


@pytest.mark.parametrize("max_running", [1, 3, 7, 64])
@pytest.mark.parametrize("seed", range(4))
def test_a_server_takes_as_long_as_its_iterations_one_by_one(max_running: int, seed: int) -> None:
    rng = random.Random(seed)
    groups = [[rng.randint(1, 40) for _ in range(rng.randint(1, 5))] for _ in range(6)]
    decoding = Decoding(iteration_s=0.3, response_s=0.07, max_running=max_running)
    assert generation_seconds(decoding, groups, num_servers=1) == pytest.approx(iterate(decoding, groups), rel=1e-9)


def test_without_a_limit_seconds_are_those_of_the_longest_and_of_all_tokens() -> None:
    groups = [[3, 50], [17, 4], [21]]
    decoding = Decoding(iteration_s=0.2, response_s=0.01, max_running=100)
    expected = 0.2 * 50 + 0.01 * (3 + 50 + 17 + 4 + 21)
    assert generation_seconds(decoding, groups, num_servers=1) == pytest.approx(expected, rel=1e-9)


def test_equal_requests_are_dealt_out_evenly() -> None:
    """12 requests of 2 responses on 4 servers: 6 responses run on each."""
    decoding = Decoding(iteration_s=1.0, response_s=0.5, max_running=100)
    assert generation_seconds(decoding, [[10, 10]] * 12, num_servers=4) == pytest.approx(10 * (1 + 6 * 0.5))


def test_siblings_stay_together_and_the_least_busy_server_is_asked() -> None:
    """A request of four, then four of one, which the second server takes. A token takes 1 s for each response."""
    decoding = Decoding(iteration_s=0.0, response_s=1.0, max_running=100)
    assert generation_seconds(decoding, [[5] * 4, [5], [5], [5], [5]], num_servers=2) == pytest.approx(20.0)


def test_beyond_the_rollouts_in_flight_requests_wait_in_the_trainer() -> None:
    """One at a time: 3 requests of 2 responses that take 10 (1 + 2 x 0.5) = 20 s each."""
    env = simpy.Environment()
    decoding = Decoding(iteration_s=1.0, response_s=0.5, max_running=100)
    fleet = SimulatedFleet(env, decoding, num_servers=1, max_rollouts_in_flight=3)
    env.run(until=fleet.ask([[10, 10]] * 3, num_needed=3).is_answered)
    assert env.now == pytest.approx(60.0)


def test_an_update_stops_responses_and_lets_them_go_on() -> None:
    env = simpy.Environment()
    decoding = Decoding(iteration_s=1.0, response_s=0.0, max_running=10)
    fleet = SimulatedFleet(env, decoding, num_servers=1, max_rollouts_in_flight=10)
    batch = fleet.ask([[10]], num_needed=1)

    def interrupt() -> simpy.events.ProcessGenerator:
        yield env.timeout(4)
        yield from fleet.update(1, 7.0, [2.0])

    env.process(interrupt())
    env.run(until=batch.is_answered)
    assert env.now == pytest.approx(4 + 7 + 6 * 2), "six tokens are left, on a server that takes twice as long"
    assert fleet.busy_s() == pytest.approx(16.0)
    assert batch.answers[0].version == 0
    later = fleet.ask([[1]], num_needed=1)
    env.run(until=later.is_answered)
    assert later.answers[0].version == 1


def test_what_is_aborted_is_not_decoded() -> None:
    env = simpy.Environment()
    decoding = Decoding(iteration_s=0.0, response_s=1.0, max_running=10)
    fleet = SimulatedFleet(env, decoding, num_servers=1, max_rollouts_in_flight=10)
    env.run(until=fleet.ask([[2], [50]], num_needed=1).is_answered)
    assert env.now == pytest.approx(4.0)
    fleet.abort()
    second = fleet.ask([[3]], num_needed=1)
    env.run(until=second.is_answered)
    assert env.now == pytest.approx(7.0), "nothing runs beside it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration_s": -1.0}, "neither may be negative"),
        ({"iteration_s": 0.0, "response_s": 0.0}, "one must be above 0"),
        ({"max_running": 0}, "max_running 0"),
    ],
)
def test_a_server_that_cannot_be_is_refused(changes: dict[str, float], message: str) -> None:
    values = {"iteration_s": 1.0, "response_s": 1.0, "max_running": 1} | changes
    with pytest.raises(ValueError, match=message):
        Decoding(**values)  # type: ignore[arg-type]
