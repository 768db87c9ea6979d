"""What a vLLM server understands: the OpenAI completions API with token ids, and its endpoints for weights."""

from __future__ import annotations

from typing import Any

import httpx

from megatron_orz.rollout.client import Answer, GenerationRequest, Memory, ServerClient, sampling_parameters
from megatron_orz.rollout.servers import MODEL_NAME


class VLLMClient(ServerClient):
    """A client of one vLLM server.

    model: the name under which it serves the model.
    """

    generate_path = "/v1/completions"
    version_path = "/weight_info"
    progress_metrics = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")

    def __init__(self, url: str, *, request_timeout_s: float, model: str = MODEL_NAME) -> None:
        super().__init__(url, request_timeout_s=request_timeout_s)
        self._model = model

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a generation request."""
        return {
            "model": self._model,
            "request_id": request.request_id,
            "prompt": request.prompt.token_ids,
            "n": request.num_responses,
            "seed": request.seed,
            "max_tokens": request.sampling.max_response_tokens,
            **sampling_parameters(request.sampling),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "logprobs": 0,
        }

    def answers(self, reply: Any, request: GenerationRequest) -> list[Answer]:
        """The choices of a completion."""
        if reply["id"] != f"cmpl-{request.request_id}":
            raise ValueError(f"this answers {reply['id']!r}, not {request.request_id!r}")
        return [
            Answer(
                token_ids=choice["token_ids"],
                log_probs=choice["logprobs"]["token_logprobs"],
                finish_reason=choice["finish_reason"],
                versions=[(0, request.version)],
            )
            for choice in self.siblings(reply["choices"])
        ]

    def siblings(self, choices: Any) -> list[Any]:
        """The choices of a reply in the order of their indices."""
        ordered = sorted(choices, key=lambda choice: choice["index"])
        if [choice["index"] for choice in ordered] != list(range(len(ordered))):
            raise ValueError("two choices have the same index")
        return ordered

    def set_version(self, version: int) -> None:
        """Tells the server the version of the weights it holds."""
        self.post("/update_weight_version", {"new_version": str(version)})

    async def drop_requests(self, http: httpx.AsyncClient) -> None:
        """Ends all requests the server works on."""
        await self.tell(http, "/abort_requests", {})

    async def sleep(self, http: httpx.AsyncClient) -> None:
        """Gives up the GPU memory of weights and cache; level 1 would keep a copy of the weights in host memory."""
        await self.tell(http, "/sleep", {}, level="2")

    async def wake(self, http: httpx.AsyncClient, what: Memory) -> None:
        """Takes the GPU memory of one of them again."""
        await self.tell(http, "/wake_up", {}, tags=what)
