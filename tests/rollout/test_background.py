"""Servers that generate while the caller does something else, and meet weight updates meanwhile."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import Timer

import pytest

from megatron_orz.rollout.servers import ServerError
from tests.rollout.conftest import make_prompts
from tests.rollout.stand_in_fleet import contents, expected, open_stand_ins
from tests.rollout.test_process import wait_for
from tests.rollout.test_server_group import all_up

pytestmark = pytest.mark.usefixtures("impatient_watch")


def test_servers_generate_in_the_background(tmp_path: Path) -> None:
    prompts = make_prompts(6)
    with open_stand_ins(tmp_path, 2) as servers:
        servers.update(1)
        servers.hold(0, 1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 6)
        servers.release(0, 1)
        assert contents(under_way.result()) == expected(prompts, version=1)
        servers.kill(0)
        servers.kill(1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        with pytest.raises(ServerError, match="0 of 2 servers can answer"):
            under_way.result()


def test_an_update_waits_for_what_was_asked_and_what_waits_gets_the_new_weights(tmp_path: Path) -> None:
    prompts = make_prompts(12)
    with open_stand_ins(tmp_path, 2, max_rollouts_in_flight=6) as servers:
        servers.update(1)
        servers.hold(0, 1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 4)
        update = Timer(0, servers.update, [2])
        update.start()
        wait_for(lambda: servers.group._router._is_held)
        servers.release(0, 1)
        update.join()
        old, new = expected(prompts, version=1), expected(prompts, version=2)
        assert contents(under_way.result()) == old[: 3 * 4] + new[3 * 4 :]


def test_responses_under_way_go_on_with_the_new_weights(tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_stand_ins(tmp_path, 2, swaps_within_responses=True) as servers:
        servers.update(1)
        servers.hold(0, 1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 4)
        servers.update(3)
        assert servers.group.metrics()["fleet/servers_up"] == 2
        servers.release(0, 1)
        rollouts = under_way.result()
        assert [rollout.spans for rollout in rollouts] == [[(1, 3), (3, 3)]] * 12
        old, new = (expected(prompts, version=version, is_seeded=False) for version in (1, 3))
        assert [rollout.response_ids for rollout in rollouts] == [
            before[:3] + after[3:] for (_, before, _), (_, after, _) in zip(old, new, strict=True)
        ]


def test_what_somebody_waits_for_comes_before_the_background_and_older_before_newer(tmp_path: Path) -> None:
    """One request at a time, so that the order in which they arrive is the order in which they were dealt out."""
    prompts = make_prompts(3)
    with open_stand_ins(tmp_path, 1, max_rollouts_in_flight=1) as servers:
        servers.hold(0)
        under_way = [servers.fleet.start(prompts, num_responses=1, seed=seed, answers={}) for seed in (1, 2)]
        wait_for(lambda: len(servers.requests(0)) == 1)
        somebody = Timer(0, servers.fleet.generate, [prompts], {"num_responses": 1, "seed": 3})
        somebody.start()
        wait_for(lambda: len(servers.group._router._lists) == 3)
        servers.release(0)
        somebody.join()
        for rollouts in under_way:
            rollouts.result()
        seeds = [int(request["request_id"].split("-s")[1].split("-")[0]) for request in servers.requests(0)]
        assert seeds == [1, 3, 3, 3, 1, 1, 2, 2, 2]


def test_what_is_begun_at_once_is_dealt_out_in_its_order(tmp_path: Path) -> None:
    """Each is checked for the servers' versions first, which takes one longer than another."""
    (prompt,) = make_prompts(1)
    with open_stand_ins(tmp_path, 2, max_rollouts_in_flight=1) as servers:
        under_way = [servers.fleet.start([prompt], num_responses=1, seed=seed, answers={}) for seed in range(20)]
        for rollouts in under_way:
            rollouts.result()
        for index in range(2):
            seeds = [int(request["request_id"].split("-s")[1].split("-")[0]) for request in servers.requests(index)]
            assert seeds == sorted(seeds)


def test_answers_that_are_there_are_not_asked_for(tmp_path: Path) -> None:
    prompts = make_prompts(6)
    with open_stand_ins(tmp_path, 2) as servers:
        whole = servers.group.generate(prompts, num_responses=3, seed=0)
        answers = {index: whole[index] for index in (4, 1)}
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers=answers)
        assert contents(under_way.result()) == expected(prompts, version=-1)
        assert answers == whole
        asked = [request["request_id"] for index in range(2) for request in servers.requests(index)]
        assert sorted(asked) == sorted(f"v-1-s0-p{index}" for index in [*range(6), 0, 2, 3, 5])


def test_an_update_that_kills_servers_leaves_the_background_to_those_started_anew(tmp_path: Path) -> None:
    prompts = make_prompts(12)
    with open_stand_ins(tmp_path, 2, swaps_within_responses=True) as servers:
        servers.update(1)
        servers.hold(0, 1)
        under_way = servers.fleet.start(prompts, num_responses=3, seed=0, answers={})
        wait_for(lambda: servers.num_requests() == 12)
        has_memory, router = servers.group._has_memory, servers.group._router
        servers.group._portal.call(has_memory.clear)  # one that is killed comes back after the update
        servers.kill(1)
        servers.update(2)  # the other one waits in its old requests, which its new weights finish
        servers.group._portal.call(has_memory.set)
        wait_for(all_up(servers.group))
        # As an update begins: without it, a moment with no server would end the background.
        servers.group._portal.call(partial(router.hold, until_answered=False))
        servers.kill(0)
        servers.update(3)
        assert contents(under_way.result()) == expected(prompts, version=3, is_seeded=False)
