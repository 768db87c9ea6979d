"""Talks to a vLLM server over HTTP: token ids in, token ids out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, get_args

import httpx

from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.sampling import prompt_seed
from megatron_orz.rollout.servers import MODEL_NAME, ServerError
from megatron_orz.rollout.token import authorization
from megatron_orz.types import FinishReason, Prompt, Rollout

# Enough to keep a server's batch full; what is beyond would only wait in its queue, at the cost of its deadline. Each
# request holds a connection, and processes may often open no more than 1024 files.
_MAX_ROLLOUTS_IN_FLIGHT = 2048
_MAX_REQUESTS_IN_FLIGHT = 512

# The server drops connections idle for 5 s, and a request sent at that moment fails. Dropping them earlier here
# leaves no such moment.
_KEEPALIVE_S = 1.0


class VLLMClient:
    """A client of one server; a context manager.

    request_timeout_s: deadline of each generation request, from sending to the last byte.
    """

    def __init__(self, url: str, *, request_timeout_s: float) -> None:
        self.url = url
        self._request_timeout_s = request_timeout_s
        self._limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S)
        self._http = httpx.Client(base_url=url, limits=self._limits, trust_env=False, headers=authorization())

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        num_responses: int,
        seed: int,
        version: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`num_responses` rollouts for each prompt, siblings adjacent, in the order of the prompts.

        Raises ServerError when the server holds other weights than `version` before or after.
        """
        self.check_version(version)
        rollouts = asyncio.run(self._generate(prompts, sampling, num_responses, seed, version, on_rollout))
        self.check_version(version)
        return rollouts

    def check_version(self, version: int) -> None:
        """Raises ServerError unless the server's weights are those of `version`."""
        served = self.get("/weight_info")["weight_version"]
        if served != str(version):
            raise ServerError(
                f"the server at {self.url} holds weights of version {served}, not {version}; "
                "only this run's update_weights may change them"
            )

    def get(self, path: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """The JSON answer to a GET."""
        return self._call("GET", path, timeout_s=timeout_s)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """The JSON answer to a POST."""
        return self._call("POST", path, json=body, params=query, timeout_s=timeout_s)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _call(self, method: str, path: str, *, timeout_s: float, **request: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, timeout=timeout_s, **request)
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise ServerError(f"{self.url}{path} is unreachable: {error!r}") from error
        return _answer(response)

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        num_responses: int,
        seed: int,
        version: int,
        on_rollout: Callable[[], None] | None,
    ) -> list[Rollout]:
        num_in_flight = min(max(1, _MAX_ROLLOUTS_IN_FLIGHT // num_responses), _MAX_REQUESTS_IN_FLIGHT)
        vacancies = asyncio.Semaphore(num_in_flight)
        body = _sampling_body(sampling, num_responses)

        async def siblings(http: httpx.AsyncClient, index: int, prompt: Prompt) -> list[Rollout]:
            request = {**body, "prompt": prompt.token_ids, "seed": prompt_seed(seed, index)}
            async with vacancies:
                answer = await self._complete(http, request)
            rollouts = _rollouts(answer, prompt, num_responses, version)
            if on_rollout is not None:
                for _ in rollouts:
                    on_rollout()
            return rollouts

        async with httpx.AsyncClient(
            base_url=self.url, limits=self._limits, timeout=None, trust_env=False, headers=authorization()
        ) as http:
            # The first failure is raised at once; asyncio.run then cancels the other requests.
            answers = await asyncio.gather(*(siblings(http, *item) for item in enumerate(prompts)))
        return [rollout for answer in answers for rollout in answer]

    async def _complete(self, http: httpx.AsyncClient, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return _answer(await http.post("/v1/completions", json=request))
        except TimeoutError as error:
            raise ServerError(
                f"a generation request took longer than fleet.request_timeout_s = {self._request_timeout_s:g} s; "
                "raise it, or lower sampling.max_response_tokens or ppo.num_responses"
            ) from error
        except httpx.TransportError as error:
            raise ServerError(f"the connection to {self.url} broke during a generation request: {error!r}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _answer(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != httpx.codes.OK:
        raise ServerError(f"{response.url} answered {response.status_code}: {response.text[:1000]}")
    answer: dict[str, Any] = response.json()
    return answer


def _sampling_body(sampling: SamplingConfig, num_responses: int) -> dict[str, Any]:
    """The part of a request that all prompts share.

    Every parameter a model's generation_config.json may set is given here, else its default would apply.
    """
    return {
        "model": MODEL_NAME,
        "n": num_responses,
        "max_tokens": sampling.max_response_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # so that a stop string may be a special token
        "return_token_ids": True,
        "logprobs": 0,
    }


def _rollouts(answer: Mapping[str, Any], prompt: Prompt, num_responses: int, version: int) -> list[Rollout]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != num_responses:
        raise ServerError(f"the server sent {len(choices)} responses to prompt {prompt.prompt_id}, not {num_responses}")
    rollouts = []
    for choice in choices:
        token_ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(token_ids) != len(log_probs):
            raise ServerError(
                f"a response to prompt {prompt.prompt_id} has {len(token_ids)} tokens and {len(log_probs)} log-probs"
            )
        if choice["finish_reason"] not in get_args(FinishReason):
            raise ServerError(f"a response to prompt {prompt.prompt_id} ended for {choice['finish_reason']!r}")
        rollouts.append(
            Rollout(
                prompt=prompt,
                response_ids=token_ids,
                rollout_log_probs=log_probs,
                finish_reason=choice["finish_reason"],
                policy_version=version,
            )
        )
    return rollouts
