"""A server that somebody else started, asked for responses and left as it is: that of a live run, or any vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import httpx

from megatron_orz.closeable import Closeable
from megatron_orz.config import SamplingConfig
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.client import CONTROL_TIMEOUT_S, LIMITS, GenerationRequest, checked, json_of
from megatron_orz.rollout.sampling import prompt_seed
from megatron_orz.rollout.servers import ServerError
from megatron_orz.rollout.token import authorization
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.types import Prompt, Rollout

_MAX_REQUESTS_IN_FLIGHT = 128


class LiveServer(Closeable):
    """Generation by the first model that a server at `url` serves, whatever its name. A context manager.

    Raises ServerError when it cannot be reached, wants another token, or is no vLLM server that takes token ids.
    """

    def __init__(self, url: str, sampling: SamplingConfig, *, request_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._sampling = sampling
        models = self._get("/v1/models") or {}
        if not models.get("data"):
            raise ServerError(f"the server at {self.url} serves no model; name a vLLM server")
        self._client = VLLMClient(self.url, request_timeout_s=request_timeout_s, model=models["data"][0]["id"])

    def weight_version(self) -> str | None:
        """The version of the weights that a run has given the server; None for one that belongs to no run."""
        info = self._get("/weight_info")
        return None if info is None else str(info.get("weight_version"))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts.

        Raises ServerError when a run gave the server new weights meanwhile: the responses would be of two policies.
        """
        before = self.weight_version()
        version = int(before) if before is not None and before.isdecimal() else INITIAL_VERSION
        rollouts = asyncio.run(self._generate(prompts, num_responses, seed, version, on_rollout or (lambda: None)))
        after = self.weight_version()
        if after != before:
            raise ServerError(
                f"the server at {self.url} went from weights of version {before} to {after} during generation; "
                "evaluate while its run is paused, or a checkpoint of the run"
            )
        return rollouts

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    async def _generate(
        self, prompts: Sequence[Prompt], num_responses: int, seed: int, version: int, on_rollout: Callable[[], None]
    ) -> list[Rollout]:
        vacancies = asyncio.Semaphore(_MAX_REQUESTS_IN_FLIGHT)

        async def siblings(http: httpx.AsyncClient, index: int, prompt: Prompt) -> list[Rollout]:
            request = GenerationRequest(
                request_id=f"live-{uuid4()}",
                prompt=prompt,
                num_responses=num_responses,
                seed=prompt_seed(seed, index),
                sampling=self._sampling,
                version=version,
            )
            async with vacancies:
                rollouts = await self._client.respond(http, request)
            for _ in rollouts:
                on_rollout()
            return rollouts

        async with httpx.AsyncClient(limits=LIMITS, trust_env=False, headers=authorization()) as http:
            answers = await asyncio.gather(*(siblings(http, *item) for item in enumerate(prompts)))
        return [rollout for answer in answers for rollout in answer]

    def _get(self, path: str) -> dict[str, Any] | None:
        """The JSON answer to a GET; None where the server has no such path."""
        try:
            response = httpx.get(self.url + path, timeout=CONTROL_TIMEOUT_S, trust_env=False, headers=authorization())
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url}{path} cannot be reached ({error!r}); check the address") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        answer = json_of(checked(response))
        if not isinstance(answer, dict):
            raise ServerError(f"{response.url} answered no JSON object: {response.text[:200]}")
        return answer
