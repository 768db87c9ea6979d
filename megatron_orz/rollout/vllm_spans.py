"""vLLM's API of token ids in and out, which says whose weights sampled which token of a response.

Its answers have twice the bytes of a completion's and take a server more work, so that it is asked only where weights
may change amid a response.
"""

from __future__ import annotations

from typing import Any

from megatron_orz.rollout.client import Answer, GenerationRequest
from megatron_orz.rollout.vllm_client import VLLMClient

SERVER_ARGUMENTS = ("--enable-scale-out",)
"""What opens this API."""


class SpanVLLMClient(VLLMClient):
    """A client of one vLLM server whose weights may change amid a response."""

    generate_path = "/inference/v1/generate"

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a generation request: the sampling parameters of a completion, but for the seed, in a part."""
        completion = super().body(request)
        outer = {"model": completion.pop("model"), "request_id": completion.pop("request_id")}
        outer["token_ids"] = completion.pop("prompt")
        del completion["return_token_ids"]
        # A CPU server dies of a seeded request whose tokens it computes in chunks, as when it takes one up again.
        del completion["seed"]
        return {**outer, "sampling_params": completion}

    def answers(self, reply: Any, request: GenerationRequest) -> list[Answer]:
        """The choices of a reply."""
        if reply["request_id"] != f"generate-tokens-{request.request_id}":
            raise ValueError(f"this answers {reply['request_id']!r}, not {request.request_id!r}")
        return [
            Answer(
                token_ids=choice["token_ids"],
                log_probs=[token["logprob"] for token in choice["logprobs"]["content"]],
                finish_reason=choice["finish_reason"],
                versions=[(span["start"], int(span["version"])) for span in choice["weight_versions"]],
            )
            for choice in self.siblings(reply["choices"])
        ]
