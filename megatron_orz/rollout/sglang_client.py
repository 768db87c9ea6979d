"""What an SGLang server understands: its own /generate API with token ids, and its endpoints for weights."""

from __future__ import annotations

from typing import Any

import httpx

from megatron_orz.rollout.client import Answer, GenerationRequest, Memory, ServerClient, sampling_parameters
from megatron_orz.rollout.servers import ServerError


class SGLangClient(ServerClient):
    """A client of one SGLang server.

    Requests have no seed: siblings would share it, and SGLang heeds seeds in its deterministic mode only.
    """

    generate_path = "/generate"
    version_path = "/model_info"
    progress_metrics = ("sglang:realtime_tokens_total",)

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a generation request."""
        return {
            "rid": request.request_id,
            "input_ids": request.prompt.token_ids,
            "sampling_params": {
                "n": request.num_responses,
                "max_new_tokens": request.sampling.max_response_tokens,
                "no_stop_trim": True,
                **sampling_parameters(request.sampling),
            },
            "return_logprob": True,
            "logprob_start_len": -1,  # of the response only
            "top_logprobs_num": 0,
            "stream": False,
        }

    def answers(self, reply: Any, request: GenerationRequest) -> list[Answer]:
        """A reply is one response, or a list of siblings; each names the weights it was made by."""
        siblings = [reply] if isinstance(reply, dict) else list(reply)
        versions = {sibling["meta_info"]["weight_version"] for sibling in siblings}
        if versions != {str(request.version)}:
            raise ValueError(f"the weights are of version {versions}, not {request.version}")
        return [
            Answer(
                token_ids=sibling["output_ids"],
                log_probs=[log_prob for log_prob, *_ in sibling["meta_info"]["output_token_logprobs"]],
                finish_reason=sibling["meta_info"]["finish_reason"]["type"],
                versions=[(0, request.version)],
            )
            for sibling in siblings
        ]

    def set_version(self, version: int) -> None:
        """Tells the server the version of the weights it holds."""
        self.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def drop_requests(self, http: httpx.AsyncClient) -> None:
        """Ends all requests the server works on."""
        await self.tell(http, "/abort_request", {"abort_all": True})

    async def sleep(self, http: httpx.AsyncClient) -> None:
        """Gives up the GPU memory of weights and cache."""
        await self.tell(http, "/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    async def wake(self, http: httpx.AsyncClient, what: Memory) -> None:
        """Takes the GPU memory of one of them again."""
        await self.tell(http, "/resume_memory_occupation", {"tags": [what]})

    def load(self, directory: str, version: int, *, timeout_s: float) -> None:
        """Replaces the weights by those in a checkpoint directory, and empties the prefix cache."""
        body = {"model_path": directory, "weight_version": str(version), "flush_cache": True}
        answer = self.post("/update_weights_from_disk", body, timeout_s=timeout_s)
        if not answer["success"]:
            raise ServerError(f"{self.url} did not load the weights of version {version}: {answer['message']}")
