"""The sets of variants that are compared: what each changes of a recipe's command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class AblationSet:
    """Variants of a recipe that answer one question."""

    question: str
    variants: Mapping[str, str]
    """Name -> options of the recipe's command line. One that changes nothing stands for the recipe as it is."""


SETS: Mapping[str, AblationSet] = MappingProxyType(
    {
        "algorithms": AblationSet(
            "What each algorithm of docs/algorithms.md makes of the same model, prompts and learning rates",
            {
                "ppo": "--ppo.advantages gae",
                "grpo": "--ppo.advantages group_normalised --ppo.no-whiten-advantages --ppo.loss-mean sequence "
                "--kl.coefficient 0.04",
                "rloo": "--ppo.advantages leave_one_out --ppo.no-whiten-advantages --ppo.loss-mean constant "
                "--kl.coefficient 0.01 --kl.estimator k1 --kl.place reward",
                "reinforce++": "--ppo.advantages group_centred --ppo.whiten-advantages --kl.coefficient 0.001 "
                "--kl.estimator k2",
                "dr-grpo": "--ppo.advantages group_centred --ppo.no-whiten-advantages --ppo.loss-mean constant",
                "dapo": "--ppo.advantages group_normalised --ppo.no-whiten-advantages --ppo.clip-eps-high 0.28 "
                "--ppo.overlong-tokens 16 --ppo.max-resampling-rounds 2",
            },
        ),
        "gae-lambda": AblationSet(
            "Lambda of the advantages and returns",
            {"1.0": "--ppo.gae-lambda 1.0", "0.95": "--ppo.gae-lambda 0.95"},
        ),
        "kl": AblationSet(
            "A penalty on the divergence from the base model",
            {
                "none": "--kl.coefficient 0",
                "loss": "--kl.coefficient 0.05 --kl.estimator k3 --kl.place loss",
                "penalty": "--kl.coefficient 0.05 --kl.estimator k1 --kl.place reward",
            },
        ),
        "temperature": AblationSet(
            "Temperature of the responses, in training and in the held-out score",
            {
                "1.0": "--sampling.temperature 1.0",
                "0.6": "--sampling.temperature 0.6",
                "1.2": "--sampling.temperature 1.2",
            },
        ),
        "data-scale": AblationSet(
            "Number of different training prompts, the first of the file",
            {"all": "", "128": "--data.max-prompts 128", "32": "--data.max-prompts 32"},
        ),
        "updates": AblationSet(
            "Mini-batches, each an optimizer step, that the policy takes on the responses of a step",
            {
                "1": "--ppo.num-policy-updates 1",
                "2": "--ppo.num-policy-updates 2",
                "4": "--ppo.num-policy-updates 4",
            },
        ),
    }
)
