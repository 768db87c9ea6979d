"""Generation inside the trainer, with transformers: for small models, and where no server can be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz.config import ModelConfig, SamplingConfig
from megatron_orz.ranks import Ranks, exhausting
from megatron_orz.rollout import INITIAL_VERSION
from megatron_orz.rollout.decoding import Response, decode
from megatron_orz.rollout.sampling import Endings, StopStrings, uniforms
from megatron_orz.rollout.slots import SLOTS
from megatron_orz.rollout_arrays import RolloutArrays
from megatron_orz.types import NamedWeights, OnAnswer, Prompt, Rollout


class LocalFleet:
    """A Fleet without servers: every rank holds the whole model and answers its share of the prompts."""

    def __init__(
        self,
        model: ModelConfig,
        sampling: SamplingConfig,
        *,
        ranks: Ranks,
        max_batch_rollouts: int,
        device: torch.device | str | None = None,
    ) -> None:
        """device: the current CUDA device where there is one, else the CPU."""
        self._model = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=model.dtype,
            attn_implementation=SLOTS,
            local_files_only=True,
            trust_remote_code=False,
        )
        self._model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
        eos_ids = _eos_ids(self._model.generation_config.eos_token_id, tokenizer.eos_token_id)
        stop_strings = StopStrings(tokenizer, sampling.stop)
        self._endings = Endings(eos_ids, stop_strings, vocab_size=self._model.get_output_embeddings().weight.shape[0])
        self._sampling = sampling
        self._ranks = ranks
        self._max_batch_rollouts = max_batch_rollouts
        self._version = INITIAL_VERSION
        self._on_answer: OnAnswer = lambda siblings: None

    def listen(self, on_answer: OnAnswer) -> None:
        """Has `on_answer` called with the siblings of every prompt that this rank has answered, as soon as it has."""
        self._on_answer = on_answer

    def update_weights(self, weights: NamedWeights, version: int) -> None:
        """Copies `weights` into the model.

        Raises ValueError when a name or a shape is not the model's, or when a parameter is not among the weights.
        """
        with self._ranks.share_fate("the weight update"), exhausting(weights):
            self._load(weights)
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """Rank r answers every world-size-th prompt from the r-th on; all ranks return all rollouts, in order."""
        rank, size = self._ranks.rank, self._ranks.size
        with self._ranks.share_fate("generation"):
            arrays = RolloutArrays.pack(
                self._answer(
                    prompts, range(rank, len(prompts), size), num_responses, seed, on_rollout or (lambda: None)
                )
            )
        rollouts: list[Rollout] = []
        per_rank = [
            iter(arrays.unpack(prompts[source::size], num_responses=num_responses))
            for source, arrays in enumerate(self._ranks.gather(arrays))
        ]
        for index in range(len(prompts)):
            rollouts += [next(per_rank[index % size]) for _ in range(num_responses)]
        return rollouts

    def _load(self, weights: NamedWeights) -> None:
        # Tied parameters appear under each of their names, so either name loads them both.
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        supplied = set()
        for name, weight in weights:
            if name not in parameters:
                raise ValueError(f"weight {name!r} is not a parameter of {type(self._model).__name__}")
            parameter = parameters[name]
            if parameter.shape != weight.shape:
                raise ValueError(f"weight {name!r} has shape {[*weight.shape]}, the model has {[*parameter.shape]}")
            parameter.copy_(weight)
            supplied.add(parameter)
        missing = [name for name, parameter in self._model.named_parameters() if parameter not in supplied]
        if missing:
            raise ValueError(
                f"{len(missing)} parameters got no new weight, among them {missing[0]!r}; "
                "every update must supply the whole model"
            )

    def _answer(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        num_responses: int,
        seed: int,
        on_rollout: Callable[[], None],
    ) -> list[Rollout]:
        """The rollouts for the prompts at `indices`, in that order."""
        # Prompts of similar length are prefilled together, which keeps the padding short.
        by_length = sorted(indices, key=lambda index: len(prompts[index].token_ids))
        rows = [(index, sibling) for index in by_length for sibling in range(num_responses)]
        place = {index: place for place, index in enumerate(by_length)}
        rollouts: dict[tuple[int, int], Rollout] = {}
        num_missing = dict.fromkeys(indices, num_responses)

        def on_finished(number: int, response: Response) -> None:
            index, _ = row = rows[number]
            rollouts[row] = Rollout(
                prompt=prompts[index],
                response_ids=response.token_ids,
                rollout_log_probs=response.log_probs,
                finish_reason=response.finish_reason,
                policy_version=self._version,
            )
            on_rollout()
            num_missing[index] -= 1
            if num_missing[index] == 0:
                self._on_answer([rollouts[index, sibling] for sibling in range(num_responses)])

        decode(
            self._model,
            [prompts[index].token_ids for index in by_length],
            [place[index] for index, _ in rows],
            lambda row: uniforms(seed, *rows[row], self._sampling.max_response_tokens),
            max_rows=self._max_batch_rollouts,
            sampling=self._sampling,
            endings=self._endings,
            on_finished=on_finished,
        )
        return [rollouts[index, sibling] for index in indices for sibling in range(num_responses)]


def _eos_ids(*configured: int | list[int] | None) -> frozenset[int]:
    """The end-of-sequence tokens of the generation config and of the tokenizer: a server stops at any of them."""
    ids: set[int] = set()
    for value in configured:
        ids.update([] if value is None else [value] if isinstance(value, int) else value)
    return frozenset(ids)
