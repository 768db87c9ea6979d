"""What the client sends, and which replies it believes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.client import GenerationRequest
from megatron_orz.rollout.servers import ServerError, UnreachableError
from megatron_orz.rollout.vllm_client import VLLMClient
from tests.rollout.conftest import make_prompts

REQUEST = GenerationRequest(
    request_id="v3-s0-p0",
    prompt=make_prompts(1)[0],
    num_responses=3,
    seed=11,
    sampling=SamplingConfig(max_response_tokens=8, temperature=0.5, stop=("end",)),
    version=3,
)


def good_reply() -> dict[str, Any]:
    return {
        "id": "cmpl-v3-s0-p0",
        "choices": [
            {
                "index": index,
                "token_ids": [5, 6, index],
                "logprobs": {"token_logprobs": [-0.25, -0.5, -1.0 * index]},
                "finish_reason": "stop" if index else "length",
            }
            for index in (2, 0, 1)
        ],
    }


def respond(reply: Any) -> list[Any]:
    with VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client:
        return client._rollouts(reply, REQUEST)


def test_rollouts_are_in_the_order_of_the_siblings() -> None:
    rollouts = respond(good_reply())
    assert [rollout.response_ids for rollout in rollouts] == [[5, 6, 0], [5, 6, 1], [5, 6, 2]]
    assert [rollout.rollout_log_probs[-1] for rollout in rollouts] == [0.0, -1.0, -2.0]
    assert [rollout.finish_reason for rollout in rollouts] == ["length", "stop", "stop"]
    assert all(rollout.prompt is REQUEST.prompt and rollout.policy_version == 3 for rollout in rollouts)


def test_a_request_leaves_no_sampling_parameter_to_the_servers_defaults() -> None:
    with VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client:
        body = client.body(REQUEST)
    expected = {
        "request_id": "v3-s0-p0",
        "prompt": REQUEST.prompt.token_ids,
        "n": 3,
        "seed": 11,
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": ["end"],
        "include_stop_str_in_output": True,
    }
    assert {name: body[name] for name in expected} == expected


def _edit_choice(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][1].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda reply: reply["choices"].pop(0), "2 responses, not 3"),
        (_edit_choice(index=1), "two choices have the same index"),
        (_edit_choice(token_ids=[5, 6]), "2 tokens and 3 log-probs"),
        (_edit_choice(token_ids=[], logprobs={"token_logprobs": []}), "has 0 tokens"),
        (_edit_choice(token_ids=[1] * 9, logprobs={"token_logprobs": [0.0] * 9}), "has 9 tokens"),
        (_edit_choice(token_ids=[5, 6, "7"]), "something else than token ids"),
        (_edit_choice(token_ids=[5, 6, -7]), "something else than token ids"),
        (_edit_choice(logprobs={"token_logprobs": [0.0, None, 0.0]}), "something else than responses"),
        (_edit_choice(logprobs={"token_logprobs": [0.0, float("nan"), 0.0]}), "not a finite number"),
        (_edit_choice(finish_reason="repetition"), "ended for 'repetition'"),
        (_edit_choice(finish_reason="abort"), "ended for 'abort'"),
        (lambda reply: reply.update(id="cmpl-v3-s0-p1"), "answers 'cmpl-v3-s0-p1', not 'v3-s0-p0'"),
        (lambda reply: reply.clear(), "something else than responses"),
    ],
)
def test_a_reply_that_is_not_whole_is_an_error(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    reply = good_reply()
    spoil(reply)
    with pytest.raises(ServerError, match=message):
        respond(reply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "choices", "index", "token_ids", "logprobs", "token_logprobs", "finish_reason"]),
            children,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=50)
@given(JSON)
def test_any_json_is_a_reply_or_an_error(reply: Any) -> None:
    with pytest.raises(ServerError):
        respond(reply)


@settings(max_examples=50)
@given(st.integers(0, 2), st.sampled_from(["index", "token_ids", "logprobs", "finish_reason"]), JSON)
@example(0, "index", float("inf"))
@example(0, "logprobs", {"token_logprobs": [10**400, 0, 0]})
def test_any_change_of_a_reply_leaves_whole_responses_or_an_error(index: int, key: str, value: Any) -> None:
    reply = good_reply()
    reply["choices"][index][key] = value
    try:
        rollouts = respond(reply)
    except ServerError:
        return
    for rollout in rollouts:
        assert 1 <= len(rollout.response_ids) == len(rollout.rollout_log_probs) <= 8
        assert all(type(token) is int and token >= 0 for token in rollout.response_ids)


def test_a_server_that_is_gone_is_an_error() -> None:
    with (
        VLLMClient("http://127.0.0.1:9", request_timeout_s=1) as client,
        pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9/weight_info is unreachable"),
    ):
        client.get("/weight_info")
