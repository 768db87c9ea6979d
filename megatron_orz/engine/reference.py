"""The reference of a KL penalty: a policy that is asked and never trained, and may follow the one that is."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_orz.config import KLConfig, ModelConfig
from megatron_orz.engine.megatron_engine import PolicyEngine
from megatron_orz.engine.parallel import Mesh


class ReferenceEngine(PolicyEngine):
    """The weights of `kl.reference` alone, without gradients or optimizer states."""

    name = "reference"

    def __init__(
        self, kl: KLConfig, like: ModelConfig, mesh: Mesh, *, policy: PolicyEngine, temperature: float, epoch_steps: int
    ) -> None:
        """like: how the policy is built. policy: whose weights it takes at a refresh. epoch_steps: steps of an epoch.

        Raises ValueError when it is to follow a policy of another architecture.
        """
        assert kl.reference is not None
        model = replace(like, path=kl.reference, recompute="none")
        super().__init__(model, mesh, temperature=temperature, is_frozen=True)
        self._policy = policy
        self._interval = epoch_steps if kl.refresh == "epoch" else kl.refresh
        if kl.refresh != "never" and self.architecture != policy.architecture:
            raise ValueError(
                f"{kl.reference} has another architecture than the policy, whose weights it takes at a refresh; set "
                "kl.reference to a checkpoint of the same model, or kl.refresh to never"
            )

    def refresh(self, step: int) -> None:
        """Takes the policy's weights before every `interval`-th step but the first. Collective."""
        if isinstance(self._interval, int) and step > 0 and step % self._interval == 0:
            self.copy_weights(self._policy)

    @torch.no_grad()
    def copy_weights(self, policy: PolicyEngine) -> None:
        """Becomes a copy of a policy of the same architecture and layout. Collective."""
        self._check_loaded()
        policy.finish_update()
        for mine, its in zip(self.chunks, policy.chunks, strict=True):
            for name, parameter in its.named_parameters():
                mine.get_parameter(name).copy_(parameter)
