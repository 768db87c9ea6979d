"""A server that somebody else started, asked for responses and left as it is: that of a live run, or any vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.sampling import prompt_seed
from megatron_orz.rollout.servers import ServerError
from megatron_orz.types import FinishReason, Prompt, Rollout

_CONTROL_TIMEOUT_S = 60.0
_MAX_REQUESTS_IN_FLIGHT = 128
_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


class LiveServer:
    """Generation by the first model that a server at `url` serves, whatever its name.

    Raises ServerError when it cannot be reached, or is no vLLM server that returns token ids.
    """

    def __init__(self, url: str, sampling: SamplingConfig, *, request_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._sampling = sampling
        self._request_timeout_s = request_timeout_s
        models = self._get("/v1/models") or {}
        if not models.get("data"):
            raise ServerError(f"the server at {self.url} serves no model; name a vLLM server")
        self._model = models["data"][0]["id"]

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

    async def _generate(
        self, prompts: Sequence[Prompt], num_responses: int, seed: int, version: int, on_rollout: Callable[[], None]
    ) -> list[Rollout]:
        vacancies = asyncio.Semaphore(_MAX_REQUESTS_IN_FLIGHT)
        body = self._body(num_responses)

        async def siblings(http: httpx.AsyncClient, index: int, prompt: Prompt) -> list[Rollout]:
            request = {**body, "prompt": prompt.token_ids, "seed": prompt_seed(seed, index)}
            async with vacancies:
                answer = await self._complete(http, request)
            rollouts = self._rollouts(answer, prompt, num_responses, version)
            for _ in rollouts:
                on_rollout()
            return rollouts

        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=None, trust_env=False) as http:
            answers = await asyncio.gather(*(siblings(http, *item) for item in enumerate(prompts)))
        return [rollout for answer in answers for rollout in answer]

    async def _complete(self, http: httpx.AsyncClient, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                response = await http.post("/v1/completions", json=request)
        except TimeoutError as error:
            raise ServerError(
                f"{self.url} did not answer within fleet.request_timeout_s = {self._request_timeout_s:g} s; "
                "raise it, or lower num_responses"
            ) from error
        except httpx.TransportError as error:
            raise ServerError(f"the connection to {self.url} broke: {error!r}") from error
        return _json(response)

    def _body(self, num_responses: int) -> dict[str, Any]:
        """What all prompts share. Parameters that a model's generation_config.json may set are given, to undo it."""
        sampling = self._sampling
        return {
            "model": self._model,
            "n": num_responses,
            "max_tokens": sampling.max_response_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }

    def _rollouts(self, answer: Mapping[str, Any], prompt: Prompt, num_responses: int, version: int) -> list[Rollout]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rollouts = [
                Rollout(
                    prompt=prompt,
                    response_ids=list(choice["token_ids"]),
                    rollout_log_probs=list(choice["logprobs"]["token_logprobs"]),
                    finish_reason=_FINISH_REASONS[_FINISH_REASONS.index(choice["finish_reason"])],
                    policy_version=version,
                )
                for choice in choices
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"the server at {self.url} does not answer as vLLM does ({error!r}); name a vLLM server of version "
                "0.10.2 or later, which returns token ids"
            ) from error
        if len(rollouts) != num_responses:
            raise ServerError(f"the server at {self.url} sent {len(rollouts)} responses, not {num_responses}")
        return rollouts

    def _get(self, path: str) -> dict[str, Any] | None:
        """The JSON answer to a GET; None where the server has no such path."""
        try:
            response = httpx.get(self.url + path, timeout=_CONTROL_TIMEOUT_S, trust_env=False)
        except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServerError(f"{self.url}{path} cannot be reached ({error!r}); check the address") from error
        return None if response.status_code == httpx.codes.NOT_FOUND else _json(response)


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != httpx.codes.OK:
        raise ServerError(f"{response.url} answered {response.status_code}: {response.text[:1000]}")
    try:
        answer = response.json()
    except ValueError as error:
        raise ServerError(f"{response.url} answered something that is no JSON: {response.text[:200]}") from error
    if not isinstance(answer, dict):
        raise ServerError(f"{response.url} answered no JSON object: {response.text[:200]}")
    return answer
