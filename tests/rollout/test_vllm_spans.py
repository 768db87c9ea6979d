"""Which replies of the API of token ids are believed, and the versions they tell of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_spans import SpanVLLMClient
from megatron_orz.types import Rollout, Swap
from tests.rollout.test_vllm_client import REQUEST


def spans(*starts: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"start": start, "version": version, "end": 3} for start, version in starts]


def good_reply() -> dict[str, Any]:
    return {
        "request_id": "generate-tokens-v3-s0-p0",
        "choices": [
            {
                "index": index,
                "token_ids": [5, 6, index],
                "logprobs": {"content": [{"token_id": 5, "logprob": -0.25 * step} for step in range(3)]},
                "finish_reason": "stop" if index else "length",
                "weight_versions": spans((0, "3")),
            }
            for index in (2, 0, 1)
        ],
    }


def respond(reply: Any) -> list[Rollout]:
    with SpanVLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client:
        return client._rollouts(reply, REQUEST)


def test_versions_of_a_response_are_spans_of_its_tokens() -> None:
    reply = good_reply()
    reply["choices"][0]["weight_versions"] = spans((0, "3"), (1, "4"), (2, "7"))
    reply["choices"][1]["weight_versions"] = spans((0, "5"))
    rollouts = respond(reply)
    assert [rollout.response_ids for rollout in rollouts] == [[5, 6, 0], [5, 6, 1], [5, 6, 2]]
    assert [rollout.policy_version for rollout in rollouts] == [5, 3, 3]
    assert [rollout.spans for rollout in rollouts] == [[(5, 3)], [(3, 3)], [(3, 1), (4, 1), (7, 1)]]
    assert rollouts[2].swaps == (Swap(1, 4), Swap(2, 7))
    assert rollouts[0].rollout_log_probs == [0.0, -0.25, -0.5]


def test_a_request_asks_for_the_same_sampling_as_a_completion_without_a_seed() -> None:
    with (
        SpanVLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client,
        VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as plain,
    ):
        body, completion = client.body(REQUEST), plain.body(REQUEST)
    assert body.pop("token_ids") == completion.pop("prompt") == REQUEST.prompt.token_ids
    assert completion.pop("return_token_ids")
    assert completion.pop("seed")
    assert body.pop("sampling_params") == {name: completion[name] for name in completion.keys() - body.keys()}
    assert body == {"model": "policy", "request_id": "v3-s0-p0"}


def edit(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][1].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit(weight_versions=[]), r"versions of the weights are \[\], of 3 tokens"),
        (edit(weight_versions=spans((1, "3"))), "versions of the weights are .* of 3 tokens"),
        (edit(weight_versions=spans((0, "3"), (3, "4"))), "versions of the weights are .* of 3 tokens"),
        (edit(weight_versions=spans((0, "4"), (1, "3"))), "versions of the weights are .* of 3 tokens"),
        (edit(weight_versions=spans((0, "3"), (0, "4"))), "versions of the weights are .* of 3 tokens"),
        (edit(weight_versions=spans((0, "2"))), "weights of version 2 answered, older than 3"),
        (edit(weight_versions=spans((0, "default"))), "something else than responses"),
        (edit(weight_versions=None), "something else than responses"),
        (edit(logprobs={"token_logprobs": [0.0] * 3}), "something else than responses"),
        (edit(index=2), "two choices have the same index"),
        (lambda reply: reply.update(request_id="v3-s0-p1"), "answers 'v3-s0-p1', not 'v3-s0-p0'"),
    ],
)
def test_a_reply_that_is_not_whole_is_an_error(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    reply = good_reply()
    spoil(reply)
    with pytest.raises(ServerError, match=message):
        respond(reply)
