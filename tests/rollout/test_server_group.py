"""Servers that are killed, hang, slow down or talk nonsense at any moment: every request is answered once, rightly."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import psutil
import pytest

from megatron_orz.rollout import replica
from megatron_orz.rollout.server_group import ServerGroup
from megatron_orz.rollout.servers import RefusedError, ServerError
from megatron_orz.types import NamedWeights, Rollout
from tests.rollout.conftest import make_prompts
from tests.rollout.stand_in_fleet import VersionSender, contents, expected, open_stand_ins
from tests.rollout.test_process import wait_for

pytestmark = pytest.mark.usefixtures("impatient_watch")


def states(group: ServerGroup) -> list[str]:
    return [server.phase for server in group._replicas]


@pytest.fixture
def patient_with_ends(impatient_watch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed server has ended when its failure is told, however long a busy machine takes to end it."""
    monkeypatch.setattr(replica, "_DEATH_WAIT_S", 120.0)


def all_up(group: ServerGroup) -> Callable[[], bool]:
    return lambda: all(server.is_up for server in group._replicas)


def kill_in_a_loop(run_dir: Path, *, seed: int, num_updates: int) -> None:
    """Kills fall into generation, into updates, and between them; the killed servers come back."""
    draw = random.Random(seed)
    prompts = make_prompts(20)
    kills: list[int] = []
    with open_stand_ins(run_dir, 3) as servers:

        def kill(index: int) -> None:
            # After an update that failed, the server may be between two processes.
            with suppress(ValueError, psutil.NoSuchProcess):
                process = psutil.Process(servers.pid(index))
                process.kill()
                process.wait(60)
                kills.append(index)

        def is_well(index: int) -> bool:
            return servers.group._replicas[index].is_up and servers.group._portal.call(
                servers.group._replicas[index].is_well
            )

        for version in range(num_updates):
            # The watch may not have noticed the last kills yet. One server that is well outlives the step.
            up = [index for index in range(3) if is_well(index)]
            victims = draw.sample(up, k=min(len(up) - 1, draw.randint(1, 2)))
            timers = [Timer(draw.uniform(0, 0.3), kill, [victim]) for victim in victims]
            for timer in timers:
                timer.start()
            servers.update(version)
            assert contents(servers.generate(prompts)) == expected(prompts, version=version)
            for timer in timers:
                timer.join()
        assert kills
        wait_for(lambda: servers.group.metrics()["fleet/restarts"] >= 1 and all_up(servers.group)())


def test_killed_at_any_moment_in_a_loop_nothing_is_lost_and_nothing_twice(tmp_path: Path) -> None:
    kill_in_a_loop(tmp_path, seed=0, num_updates=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_killed_at_any_moment_in_a_long_loop(tmp_path: Path, seed: int) -> None:
    kill_in_a_loop(tmp_path, seed=seed, num_updates=20)


def test_a_server_that_was_started_anew_waits_for_the_weights(tmp_path: Path) -> None:
    prompts = make_prompts(6)
    with open_stand_ins(tmp_path, 2) as servers:
        servers.update(3)
        servers.kill(0)
        wait_for(lambda: servers.group._replicas[0].num_restarts == 1 and servers.group._replicas[0].is_up)
        assert contents(servers.generate(prompts)) == expected(prompts, version=3)
        assert servers.requests(0) == []
        servers.update(4)
        servers.generate(prompts)
        assert servers.requests(0)


@pytest.mark.parametrize(
    "fault",
    [
        {"is_stuck": True},
        {"reply": "<html>502 Bad Gateway</html>"},
        pytest.param({"reply": "[]"}, marks=pytest.mark.slow),
        {"drop_key": "token_ids"},
        pytest.param({"status": 500}, marks=pytest.mark.slow),
        {"drops": True},
    ],
    ids=["stuck", "no-json", "other-json", "incomplete", "error", "broken-connection"],
)
def test_a_faulty_server_is_replaced_and_its_requests_move_on(tmp_path: Path, fault: dict[str, object]) -> None:
    prompts = make_prompts(10)
    with open_stand_ins(tmp_path, 2, stuck_timeout_s=0.5) as servers:
        servers.fault(0, **fault)
        servers.hold(1)
        heard: list[Rollout] = []
        servers.fleet.listen(heard.extend)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.group._replicas[0].num_restarts == 1)
        servers.release(1)
        assert contents(under_way.result()) == expected(prompts, version=-1)
        assert sorted(contents(heard)) == sorted(expected(prompts, version=-1))  # of every answer once
        assert servers.group.metrics()["fleet/retried_requests"] >= 3


def test_a_server_that_is_suspected_and_given_up_at_once_has_one_watch_afterwards(tmp_path: Path) -> None:
    """As by the third bad answer: the watch wakes in the moment in which it is cancelled."""
    with open_stand_ins(tmp_path, 1) as servers:
        (server,) = servers.group._replicas

        def give_up() -> None:
            server._suspicion.set()
            server.fail("three requests in a row failed")

        def num_watches() -> int:
            return sum(task.get_coro().__qualname__ == "Replica._watch" for task in asyncio.all_tasks())

        servers.group._portal.call(give_up)
        wait_for(lambda: server.num_restarts == 1 and server.is_up)
        assert servers.group._portal.call(num_watches) == 1


def test_a_server_whose_watch_fails_is_lost_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(running: replica.Running, *, wait_s: float = 0.0) -> None:
        raise OSError("the file system is gone")

    with open_stand_ins(tmp_path, 1) as servers:
        monkeypatch.setattr(replica.Running, "check_alive", broken)
        wait_for(lambda: states(servers.group) == ["lost"])
        with pytest.raises(ServerError, match=r"0 of 1 servers .*server 0: its watch failed: .* system is gone"):
            servers.generate(make_prompts(1))


def test_a_stopped_process_is_noticed_and_replaced(tmp_path: Path) -> None:
    prompts = make_prompts(10)
    with open_stand_ins(tmp_path, 2) as servers:
        replica_0 = servers.group._replicas[0]
        replica_0._heartbeat_timeout_s = 0.5  # the other one may be as slow as the machine
        os.kill(servers.pid(0), signal.SIGSTOP)
        assert contents(servers.generate(prompts)) == expected(prompts, version=-1)
        wait_for(lambda: replica_0.num_restarts >= 1)
        assert "took longer than 0.5 s" in replica_0.reason


def test_a_late_answer_is_asked_of_another_server(tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_stand_ins(tmp_path, 2) as servers:
        servers.group._replicas[0].client._request_timeout_s = 0.5  # the other one may be as slow as the machine
        servers.hold(0)
        assert contents(servers.generate(prompts)) == expected(prompts, version=-1)
        assert states(servers.group) == ["up", "up"]  # it computes tokens, so it is not to blame


def test_requests_that_are_late_everywhere_end_with_the_remedy(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 2, request_timeout_s=0.3) as servers:
        servers.hold(0, 1)
        with pytest.raises(ServerError, match=r"took longer than 0\.3 s \(fleet\.request_timeout_s\); raise it"):
            servers.generate(make_prompts(4))


@pytest.mark.usefixtures("patient_with_ends")
def test_fewer_servers_than_the_minimum_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 2, min_servers=2) as servers:
        servers.update(1)
        servers.hold(0, 1)
        under_way = servers.fleet.start(make_prompts(10), num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 10)
        servers.kill(0)
        reason = r"1 of 2 servers can answer, fewer than fleet\.min_servers = 2; server 0: .* ended with exit code 137"
        with pytest.raises(ServerError, match=reason):
            under_way.result()


@pytest.mark.parametrize("up_again", ["amid-the-update", "while-the-others-are-looked-at", "at-its-end"])
def test_a_server_that_died_during_an_update_and_is_up_again_already_lacks_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up_again: str
) -> None:
    """By the time the trainer looks, nothing is wrong with any server: the update is repeated, or the server waits."""
    prompts = make_prompts(6)
    send, has_died = VersionSender.send, replica.Replica.has_died
    fails = up_again != "at-its-end"
    with open_stand_ins(tmp_path, 2) as servers:
        replica_0, replica_1 = servers.group._replicas

        def is_up_again() -> bool:
            return replica_0.num_restarts == 1 and replica_0.is_up

        def late(sender: VersionSender, weights: NamedWeights, version: int) -> None:
            if not fails or replica_0.num_restarts:
                send(sender, weights, version)
            if replica_0.num_restarts:
                return
            servers.kill(0)
            if up_again != "while-the-others-are-looked-at":
                wait_for(is_up_again)
            if fails:
                raise RuntimeError("the connection broke")

        async def look_late(looked_at: replica.Replica) -> bool:
            answer = await has_died(looked_at)
            if up_again == "while-the-others-are-looked-at":
                while not is_up_again():
                    await asyncio.sleep(0.01)
            return answer

        monkeypatch.setattr(VersionSender, "send", late)
        monkeypatch.setattr(replica.Replica, "has_died", look_late)
        servers.update(1)
        assert contents(servers.generate(prompts)) == expected(prompts, version=1)
        assert [replica_0.num_restarts, replica_1.num_restarts] == [1, int(fails)]
        assert bool(servers.requests(0)) == fails


def test_an_update_waits_for_the_minimum(tmp_path: Path) -> None:
    """The only server dies between two steps: the next update finds it started anew."""
    prompts = make_prompts(4)
    with open_stand_ins(tmp_path, 1) as servers:
        servers.kill(0)
        servers.update(1)
        assert contents(servers.generate(prompts)) == expected(prompts, version=1)


def test_a_server_that_fails_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_stand_ins(tmp_path, 1) as servers:
        monkeypatch.setattr(servers.group._replicas[0], "_run", _cannot_start)
        servers.kill(0)
        with pytest.raises(ServerError, match=r"0 of 1 servers can answer, .*server 0: no more memory"):
            servers.update(1)
        assert states(servers.group) == ["lost"]


def _cannot_start(num_restarts: int) -> replica.Running:
    raise OSError("no more memory")


def test_servers_sleep_and_wake_in_stages_and_the_dead_stay_dead_meanwhile(tmp_path: Path) -> None:
    prompts = make_prompts(6)
    with open_stand_ins(tmp_path, 2) as servers:
        servers.update(1)
        servers.group.sleep()
        servers.kill(0)
        wait_for(lambda: states(servers.group) == ["down", "up"])
        servers.group.wake("weights")
        servers.update(2)
        servers.group.wake("kv_cache")
        assert contents(servers.generate(prompts)) == expected(prompts, version=2)
        assert servers.calls(1) == ["/sleep?level=2", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
        wait_for(all_up(servers.group))  # there is memory for its start again
        servers.group.sleep()
        assert servers.calls(0) == ["/sleep?level=2"]


def test_a_server_that_does_not_fall_asleep_has_ended_before_its_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(http: object) -> None:
        raise ServerError("the allocator is in disorder")

    with open_stand_ins(tmp_path, 2) as servers:
        process = psutil.Process(servers.pid(0))
        monkeypatch.setattr(servers.group._replicas[0].client, "sleep", refuse)
        servers.group.sleep()
        assert not process.is_running()
        assert states(servers.group) == ["down", "up"]


@pytest.mark.usefixtures("patient_with_ends")
def test_without_memory_for_a_restart_too_few_servers_are_an_error_not_a_wait(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 1) as servers:
        servers.group.sleep()
        servers.kill(0)
        wait_for(lambda: states(servers.group) == ["down"])
        with pytest.raises(ServerError, match=r"0 of 1 servers can answer, .*exit code 137"):
            servers.update(1)


def test_a_request_that_a_server_refuses_is_not_asked_of_another(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 2) as servers:
        for index in range(2):
            servers.fault(index, status=400, reply="the prompt is too long")
        with pytest.raises(RefusedError, match=r"answered 400: the prompt is too long"):
            servers.generate(make_prompts(1))
        assert sum(len(servers.requests(index)) for index in range(2)) == 1


def test_other_weights_than_expected_are_an_error(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 2) as servers:
        servers.update(5)
        servers.group._replicas[1].client.set_version(6)
        with pytest.raises(ServerError, match=r"holds weights of version 6, not 5"):
            servers.generate(make_prompts(1))


def test_the_ids_and_seeds_of_a_request_are_those_of_every_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_MAX_BAD_ANSWERS", 100)  # a server that is started anew forgets what it was asked
    with open_stand_ins(tmp_path, 2) as servers:
        servers.fault(0, status=503)
        servers.generate(make_prompts(8))
        asked = servers.requests(0) + servers.requests(1)
        requests = [(request["request_id"], request["seed"]) for request in asked]
        assert len(requests) > 8
        assert len(set(requests)) == len({request_id for request_id, _ in requests}) == 8
        assert max(Counter(requests).values()) <= 3
