"""Which server gets which request, and when: siblings together, the least busy server next, within its share."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_orz.rollout import replica
from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.types import Rollout
from tests.rollout.conftest import make_prompts
from tests.rollout.stand_in_fleet import contents, expected, open_stand_ins
from tests.rollout.test_process import wait_for

pytestmark = pytest.mark.usefixtures("impatient_watch")


def test_siblings_go_to_one_server_and_prompts_to_all(tmp_path: Path) -> None:
    prompts = make_prompts(40)
    with open_stand_ins(tmp_path, 3) as servers:
        servers.hold(0, 1, 2)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 40)
        requests = [servers.requests(index) for index in range(3)]
        assert sorted(map(len, requests)) == [13, 13, 14]
        assert [request["n"] for of_server in requests for request in of_server] == [3] * 40
        servers.release(0, 1, 2)
        assert contents(under_way.result()) == expected(prompts, version=-1)
        servers.update(5)
        assert contents(servers.generate(prompts)) == expected(prompts, version=5)


def test_no_server_is_asked_for_more_than_its_share_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, ask = make_prompts(12), replica.Replica.ask
    asked_for: list[int] = []

    def counting(asked: replica.Replica, request: GenerationRequest) -> asyncio.Task[list[Rollout]]:
        task = ask(asked, request)
        asked_for.append(asked.num_rollouts)
        return task

    monkeypatch.setattr(replica.Replica, "ask", counting)
    with open_stand_ins(tmp_path, 2, max_rollouts_in_flight=7) as servers:
        servers.hold(0, 1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 4)
        servers.release(0, 1)
        assert contents(under_way.result()) == expected(prompts, version=-1)
    assert len(asked_for) == 12
    assert max(asked_for) == 6  # two requests of three, as a third would exceed seven


def test_a_request_counts_until_it_has_ended_also_one_that_is_dropped_before_it_begins(tmp_path: Path) -> None:
    with open_stand_ins(tmp_path, 1) as servers:
        (server,) = servers.group._replicas
        (request,) = servers.group._requests(make_prompts(1), 3, 0)

        async def ask_and_drop() -> list[int]:
            task = server.ask(request)
            counts = [server.num_rollouts]
            task.cancel()
            await asyncio.wait([task], timeout=60)
            return [*counts, server.num_rollouts]

        assert servers.group._portal.call(ask_and_drop) == [3, 0]


def test_a_slow_server_gets_less_to_do(tmp_path: Path) -> None:
    prompts = make_prompts(20)
    with open_stand_ins(tmp_path, 2, max_rollouts_in_flight=6) as servers:
        servers.hold(0)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: len(servers.requests(1)) == 18)
        servers.release(0)
        assert contents(under_way.result()) == expected(prompts, version=-1)
        assert len(servers.requests(0)) == 2


def test_stragglers_are_dropped_once_enough_prompts_are_answered(tmp_path: Path) -> None:
    prompts = make_prompts(30)
    fast = [index for index, prompt in enumerate(prompts) if sum(prompt.token_ids) % 5]
    assert 20 <= len(fast) < 30
    with open_stand_ins(tmp_path, 2) as servers:
        for index in range(2):
            servers.fault(index, slow_s=3600.0)
        answers = servers.group.generate(prompts, num_responses=3, seed=0, num_groups=20)
        assert len(answers) == 20
        assert list(answers) == sorted(answers)
        assert answers.keys() <= set(fast)
        everything = expected(prompts, version=-1)
        for index, rollouts in answers.items():
            assert contents(rollouts) == everything[3 * index : 3 * index + 3]
        for index in range(2):
            assert servers.calls(index) == ["/abort_requests"]
            assert servers.group._replicas[index].num_rollouts == 0
