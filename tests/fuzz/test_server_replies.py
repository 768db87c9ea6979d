"""Whatever a server answers: whole rollouts, or a ServerError, after which another server is asked."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
from hypothesis import strategies as st

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.client import GenerationRequest, ServerClient
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.sglang_client import SGLangClient
from megatron_orz.rollout.vllm_client import VLLMClient
from tests.fuzz.inputs import altered, damaged, fuzz, json_values, sizes
from tests.rollout.conftest import make_prompts

REQUEST = GenerationRequest(
    request_id="r1",
    prompt=make_prompts(1)[0],
    num_responses=2,
    seed=0,
    sampling=SamplingConfig(max_response_tokens=4),
    version=3,
)
VLLM_REPLY = {
    "id": "cmpl-r1",
    "choices": [
        {
            "index": index,
            "token_ids": [5, 6 + index],
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
            "finish_reason": "stop",
        }
        for index in range(2)
    ],
}
SGLANG_REPLY = [
    {
        "output_ids": [5, 6 + index],
        "meta_info": {
            "id": f"r1_{index}",
            "weight_version": "3",
            "finish_reason": {"type": "stop", "matched": 6},
            "output_token_logprobs": [[-0.5, 5, None], [-0.25, 6 + index, None]],
            "completion_tokens": 2,
        },
    }
    for index in range(2)
]


def replies(reply: Any) -> st.SearchStrategy[tuple[int, bytes]]:
    """Status and body."""
    whole = json.dumps(reply).encode()
    bodies = (
        altered(reply).map(lambda document: json.dumps(document).encode())
        | damaged(whole)
        | json_values.map(lambda document: json.dumps(document).encode())
        | st.integers(1, 20_000).map(lambda depth: b"[" * depth)
    )
    return st.tuples(st.sampled_from([200] * 9 + [500]), bodies)


@sizes(slow=10_000)
def test_vllm(num_inputs: int) -> None:
    with VLLMClient("http://server", request_timeout_s=5.0) as client:
        fuzz(replies(VLLM_REPLY), checker(client, "check_vllm_reply"), num_inputs=num_inputs)


@sizes(slow=5_000)
def test_sglang(num_inputs: int) -> None:
    with SGLangClient("http://server", request_timeout_s=5.0) as client:
        fuzz(replies(SGLANG_REPLY), checker(client, "check_sglang_reply"), num_inputs=num_inputs)


def test_the_replies_that_are_spoiled_are_whole() -> None:
    for client, reply in ((VLLMClient, VLLM_REPLY), (SGLangClient, SGLANG_REPLY)):
        with client("http://server", request_timeout_s=5.0) as opened:
            rollouts = respond(opened, (200, json.dumps(reply).encode()))
        assert [rollout.response_ids for rollout in rollouts] == [[5, 6], [5, 7]]


def respond(client: ServerClient, reply: tuple[int, bytes]) -> Any:
    async def ask() -> Any:
        transport = httpx.MockTransport(lambda request: httpx.Response(reply[0], content=reply[1]))
        async with httpx.AsyncClient(transport=transport) as http:
            return await client.respond(http, REQUEST)

    return asyncio.run(ask())


def checker(client: ServerClient, name: str) -> Any:
    def check(reply: tuple[int, bytes]) -> None:
        try:
            rollouts = respond(client, reply)
        except ServerError:
            return
        assert len(rollouts) == 2
        for rollout in rollouts:
            assert 1 <= len(rollout.response_ids) <= 4
            assert len(rollout.response_ids) == len(rollout.rollout_log_probs)
            assert all(type(token) is int for token in rollout.response_ids)
            assert all(math.isfinite(log_prob) for log_prob in rollout.rollout_log_probs)
            assert rollout.finish_reason in ("stop", "length")

    check.__qualname__ = name
    return check
