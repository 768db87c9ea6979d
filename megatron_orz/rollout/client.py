"""What the clients of all kinds of inference servers share: HTTP, deadlines, and the checks of an answer.

A server is asked for all responses to one prompt at once, so that they share its prefill. Token ids go in and come out.
"""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import httpx

from megatron_orz.closeable import Closeable
from megatron_orz.config import SamplingConfig
from megatron_orz.rollout.servers import DeadlineError, RefusedError, ServerError, UnreachableError
from megatron_orz.rollout.token import TOKEN_VARIABLE, authorization
from megatron_orz.types import FinishReason, Prompt, Rollout, Swap

# Servers drop connections idle for 5 s, and a request sent at that moment fails. Dropping them earlier here leaves no
# such moment.
_KEEPALIVE_S = 1.0
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S)

CONTROL_TIMEOUT_S = 60.0
"""Deadline of requests that compute nothing."""

_BUSY = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_MAX_TOKEN_ID = 2**31 - 1


Memory: TypeAlias = Literal["weights", "kv_cache"]
"""The two parts of a server's GPU memory, by the names that vLLM and SGLang both use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """All responses to one prompt. Every attempt at it, on whatever server, has the same id and the same seed."""

    request_id: str
    prompt: Prompt
    num_responses: int
    seed: int
    sampling: SamplingConfig
    version: int
    """The policy version that servers hold as the request goes out: tokens of older weights are no answer to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One response as a server gives it, before it is believed."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    finish_reason: str
    versions: Sequence[tuple[int, int]]
    """(index of the first token, version of the weights) of every stretch of tokens that one version sampled."""


def sampling_parameters(sampling: SamplingConfig) -> dict[str, Any]:
    """What a request says of sampling, by the names that vLLM and SGLang both use.

    Every parameter a model's generation_config.json may set is given, else its default would apply.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "skip_special_tokens": False,  # so that a stop string may be a special token
    }


class ServerClient(Closeable):
    """A client of one server; a context manager. The subclasses know the schema of each kind of server.

    request_timeout_s: deadline of each generation request, from sending to the last byte.
    """

    generate_path: str
    version_path: str
    """Answers a GET with the `weight_version` that the server was told."""
    progress_metrics: tuple[str, ...]
    """Counters of /metrics that grow whenever the server computes."""

    def __init__(self, url: str, *, request_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._request_timeout_s = request_timeout_s
        self._http = httpx.Client(base_url=self.url, limits=LIMITS, trust_env=False, headers=authorization())

    @abstractmethod
    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a generation request."""

    @abstractmethod
    def answers(self, reply: Any, request: GenerationRequest) -> list[Answer]:
        """What the server's JSON says, siblings in order. KeyError, TypeError and ValueError: it is something else."""

    async def served_version(self, http: httpx.AsyncClient) -> str:
        """The version that the last update, or `set_version`, gave to the weights."""
        info = await self.fetch(http, self.version_path)
        if not isinstance(info, dict) or "weight_version" not in info:
            raise ServerError(f"{self.url}{self.version_path} answered with something else: {info!r}")
        return str(info["weight_version"])

    @abstractmethod
    def set_version(self, version: int) -> None:
        """Tells the server the version of the weights it holds."""

    @abstractmethod
    async def drop_requests(self, http: httpx.AsyncClient) -> None:
        """Ends all requests the server works on."""

    @abstractmethod
    async def sleep(self, http: httpx.AsyncClient) -> None:
        """Gives up the GPU memory of weights and cache; their contents are lost."""

    @abstractmethod
    async def wake(self, http: httpx.AsyncClient, what: Memory) -> None:
        """Takes the GPU memory of one of them again, its contents undefined."""

    async def respond(self, http: httpx.AsyncClient, request: GenerationRequest) -> list[Rollout]:
        """The rollouts of a request, all of them.

        Raises RefusedError when the request is wrong, ServerError when the server is: it broke the connection, let the
        deadline pass, failed, or answered with anything but `num_responses` whole responses.
        """
        remedy = "(fleet.request_timeout_s); raise it, or lower sampling.max_response_tokens or ppo.num_responses"
        reply = await self._ask(
            http, "POST", self.generate_path, timeout_s=self._request_timeout_s, remedy=remedy, json=self.body(request)
        )
        return self._rollouts(json_of(reply), request)

    async def num_computed(self, http: httpx.AsyncClient, *, timeout_s: float) -> float:
        """Tokens the server has computed since it started: grows unless it has nothing to do, or is stuck."""
        metrics = (await self._ask(http, "GET", "/metrics", timeout_s=timeout_s)).text
        samples = (line.rpartition(" ") for line in metrics.splitlines() if line.startswith(self.progress_metrics))
        try:
            return sum(float(value) for _, _, value in samples)
        except ValueError as error:
            raise ServerError(f"{self.url}/metrics answered with something else: {metrics[:200]!r}") from error

    async def check_health(self, http: httpx.AsyncClient, *, timeout_s: float) -> None:
        """Raises ServerError unless the server says that it, and what computes for it, is well."""
        await self._ask(http, "GET", "/health", timeout_s=timeout_s)

    async def fetch(self, http: httpx.AsyncClient, path: str) -> Any:
        """The JSON answer to a GET."""
        return json_of(await self._ask(http, "GET", path, timeout_s=CONTROL_TIMEOUT_S))

    async def tell(self, http: httpx.AsyncClient, path: str, body: Mapping[str, Any], **query: str) -> None:
        """A POST whose answer says nothing."""
        await self._ask(http, "POST", path, timeout_s=CONTROL_TIMEOUT_S, json=body, params=query)

    def get(self, path: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> dict[str, Any]:
        """The JSON answer to a GET."""
        return self._call("GET", path, timeout_s=timeout_s)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
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
            raise DeadlineError(f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise UnreachableError(f"{self.url}{path} is unreachable: {error!r}") from error
        answer: dict[str, Any] = json_of(checked(response))
        return answer

    async def _ask(
        self, http: httpx.AsyncClient, method: str, path: str, *, timeout_s: float, remedy: str = "", **request: Any
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                return checked(await http.request(method, f"{self.url}{path}", timeout=None, **request))
        except TimeoutError as error:
            message = f"{method} {self.url}{path} took longer than {timeout_s:g} s {remedy}"
            raise DeadlineError(message.rstrip()) from error
        except httpx.RequestError as error:
            raise UnreachableError(f"the connection to {self.url} broke during {method} {path}: {error!r}") from error

    def _rollouts(self, reply: Any, request: GenerationRequest) -> list[Rollout]:
        what = f"{self.url} answered prompt {request.prompt.prompt_id} with"
        try:
            answers = self.answers(reply, request)
            if len(answers) != request.num_responses:
                raise ServerError(f"{what} {len(answers)} responses, not {request.num_responses}")
            return [_rollout(answer, request) for answer in answers]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise ServerError(f"{what} something else than responses: {error!r}") from error


def _rollout(answer: Answer, request: GenerationRequest) -> Rollout:
    """Raises ValueError unless the answer is one whole response to the request."""
    token_ids, log_probs = list(answer.token_ids), [float(log_prob) for log_prob in answer.log_probs]
    if len(token_ids) != len(log_probs):
        raise ValueError(f"a response has {len(token_ids)} tokens and {len(log_probs)} log-probs")
    if not 1 <= len(token_ids) <= request.sampling.max_response_tokens:
        raise ValueError(f"a response has {len(token_ids)} tokens")
    if not all(type(token) is int and 0 <= token <= _MAX_TOKEN_ID for token in token_ids):
        raise ValueError("a response holds something else than token ids")
    if not all(map(math.isfinite, log_probs)):
        raise ValueError("a log-probability is not a finite number")
    first, *swaps = _versions(answer.versions, len(token_ids))
    if first.version < request.version:
        raise ValueError(f"weights of version {first.version} answered, older than {request.version}")
    return Rollout(
        prompt=request.prompt,
        response_ids=token_ids,
        rollout_log_probs=log_probs,
        finish_reason=_finish_reason(answer.finish_reason),
        policy_version=first.version,
        swaps=tuple(swaps),
    )


def _versions(stretches: Sequence[tuple[int, int]], num_tokens: int) -> list[Swap]:
    """Where versions begin, that of the first token included."""
    found = [Swap(token, version) for token, version in stretches]
    if not all(type(token) is int and type(version) is int for token, version in found):
        raise ValueError(f"the versions of the weights are {found}")
    is_ordered = all(a.token < b.token and a.version < b.version for a, b in pairwise(found))
    if not found or found[0].token != 0 or found[-1].token >= num_tokens or not is_ordered:
        raise ValueError(f"the versions of the weights are {found}, of {num_tokens} tokens")
    return found


def _finish_reason(reason: str) -> FinishReason:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise ValueError(f"a response ended for {reason!r}")  # one cut short by the server, "abort", is not whole


def checked(response: httpx.Response) -> httpx.Response:
    """The response, if it is an answer. Raises RefusedError where the request is refused, else ServerError."""
    if response.status_code == httpx.codes.OK:
        return response
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise RefusedError(
            f"{response.url} answers only those who know its token; start the server, and this program, with the same "
            f"{TOKEN_VARIABLE} in the environment"
        )
    kind = RefusedError if response.is_client_error and response.status_code not in _BUSY else ServerError
    raise kind(f"{response.url} answered {response.status_code}: {response.text[:1000]}")


def json_of(response: httpx.Response) -> Any:
    """The JSON of a response. Raises ServerError where it holds something else."""
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{response.url} answered with something else than JSON: {response.text[:200]!r}") from error
