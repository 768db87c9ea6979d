"""Policy and critic as Hugging Face models in one process, one sequence at a time: what every layout must equal.

Losses come from their formulas, updates from torch.optim.AdamW, advantages from the definition.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_orz.types import Experience, LossMean, PolicyOutput
from tests.engine import tiny
from tests.engine.layouts import (
    GAE_LAMBDA,
    GAMMA,
    NUM_SEQUENCES,
    NUM_STEPS,
    OPTIMIZER,
    TEMPERATURE,
    VALUE_HEAD_SEED,
    policy_loss,
    value_loss,
)


class Reference:
    """The models before training, and (through `trained`) after it."""

    def __init__(self, path: Path, loss_mean: LossMean, num_packs: int) -> None:
        self.sequences = tiny.random_sequences(NUM_SEQUENCES)
        self.loss_mean, self.num_packs = loss_mean, num_packs
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.body = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
        hidden = self.policy.config.hidden_size
        generator = torch.Generator().manual_seed(VALUE_HEAD_SEED)
        head = torch.empty(1, hidden).normal_(std=(1 / (hidden + 1)) ** 0.5, generator=generator)
        self.value_head = torch.nn.Parameter(head)
        self.before = self._outputs()
        self.weights_before = load_file(path / "model.safetensors")

    @cached_property
    def after(self) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        """Trains both models: (outputs, {metrics and first gradients of each, by model})."""
        policy_parameters = dict(self.policy.named_parameters())
        critic_parameters = {**dict(self.body.named_parameters(prefix="model")), "value_head": self.value_head}

        def of_policy() -> tuple[Tensor, dict[str, Tensor]]:
            outputs = [policy_loss(self._policy_output(s), s) for s in self.sequences]
            return self._mean([output.per_token for output in outputs]), self._metrics(outputs)

        def of_critic() -> tuple[Tensor, dict[str, Tensor]]:
            outputs = [value_loss(self._values(s), s) for s in self.sequences]
            return self._mean([output.per_token for output in outputs]), self._metrics(outputs)

        training = {
            "policy": self._train("policy", policy_parameters, of_policy),
            "critic": self._train("critic", critic_parameters, of_critic),
        }
        return self._outputs(), training

    def weights_after(self, model: str) -> dict[str, Tensor]:
        assert self.after
        if model == "policy":
            return {name: p.detach() for name, p in self.policy.named_parameters()}
        parameters = {**dict(self.body.named_parameters(prefix="model")), "value_head": self.value_head}
        return {name: p.detach() for name, p in parameters.items()}

    def _policy_output(self, sequence: Experience) -> PolicyOutput:
        log_p = torch.log_softmax(self.policy(sequence.tokens[None]).logits[0] / TEMPERATURE, dim=-1)
        return PolicyOutput(
            log_probs=log_p.gather(1, sequence.targets[:, None])[:, 0], entropy=-(log_p.exp() * log_p).sum(-1)
        )

    def _values(self, sequence: Experience) -> Tensor:
        return (self.body(sequence.tokens[None]).last_hidden_state[0] @ self.value_head.t())[:, 0]

    @torch.no_grad()
    def _outputs(self) -> dict[str, list[Tensor]]:
        """A tensor for each sequence."""
        values = [self._values(sequence) for sequence in self.sequences]
        return {
            "log_probs": [self._policy_output(sequence).log_probs for sequence in self.sequences],
            "values": values,
            "advantages": [self._advantages(*pair) for pair in zip(self.sequences, values, strict=True)],
        }

    @staticmethod
    def _advantages(sequence: Experience, values: Tensor) -> Tensor:
        """A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}) over one response; V after it is 0."""
        response = sequence.loss_mask.nonzero().squeeze(1).tolist()
        rewards = sequence.returns  # stand in for the rewards: every token has one
        result = torch.zeros(len(values))
        for t in response:
            for later in range(t, len(values)):
                next_value = values[later + 1] if later + 1 < len(values) else 0.0
                delta = rewards[later] + GAMMA * next_value - values[later]
                result[t] += (GAMMA * GAE_LAMBDA) ** (later - t) * delta
        return result

    def _mean(self, per_token: list[Tensor]) -> Tensor:
        """The loss over all sequences, averaged as `loss_mean` says, written out."""
        kept = [x[sequence.loss_mask] for x, sequence in zip(per_token, self.sequences, strict=True)]
        if self.loss_mean == "token":
            return torch.cat(kept).mean()
        if self.loss_mean == "sequence":
            return torch.stack([x.mean() for x in kept]).mean()
        return torch.stack([torch.cat(kept[i :: self.num_packs]).mean() for i in range(self.num_packs)]).mean()

    def _metrics(self, outputs: list[Any]) -> dict[str, Tensor]:
        masks = [sequence.loss_mask for sequence in self.sequences]
        return {
            name: torch.cat([o.metrics[name].detach()[m] for o, m in zip(outputs, masks, strict=True)]).mean()
            for name in outputs[0].metrics
        }

    @staticmethod
    def _train(name: str, parameters: dict[str, Any], loss: Any) -> dict[str, Any]:
        decayed = [p for p in parameters.values() if p.ndim > 1]
        spared = [p for p in parameters.values() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=OPTIMIZER.eps)
        steps, gradients = [], {}
        for step in range(NUM_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr * min(1.0, (step + 1) / OPTIMIZER.warmup_steps)
            optimizer.zero_grad()
            total, metrics = loss()
            total.backward()
            if step == 0:
                gradients = {key: p.grad.clone() for key, p in parameters.items()}
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER.clip_grad)
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            totals = {f"{name}/loss": total, f"{name}/grad_norm": norm, f"{name}/lr": torch.tensor(lr)}
            steps.append({key: float(value.detach()) for key, value in (totals | metrics).items()})
        return {"metrics": steps, "gradients": gradients}


def megatron_tensors(hf: dict[str, Tensor], *, num_kv_heads: int) -> dict[str, Tensor]:
    """Hugging Face tensors (weights or gradients) joined as Megatron keeps them, undivided."""
    joined = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for head in ("lm_head.weight", "value_head"):
        if head in hf:
            joined["output_layer.weight"] = hf[head]
    layers = {int(name.split(".")[2]) for name in hf if name.startswith("model.layers.")}
    for layer in layers:
        source, target = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            if f"{source}.self_attn.q_proj.{kind}" in hf:
                qkv = [hf[f"{source}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                by_head = [x.reshape(num_kv_heads, -1, *x.shape[1:]) for x in qkv]
                joined[f"{target}.self_attention.linear_qkv.{kind}"] = torch.cat(by_head, dim=1).flatten(0, 1)
        joined |= {
            f"{target}.input_layernorm.weight": hf[f"{source}.input_layernorm.weight"],
            f"{target}.self_attention.linear_proj.weight": hf[f"{source}.self_attn.o_proj.weight"],
            f"{target}.pre_mlp_layernorm.weight": hf[f"{source}.post_attention_layernorm.weight"],
        }
        for norm in ("q", "k"):
            if f"{source}.self_attn.{norm}_norm.weight" in hf:
                joined[f"{target}.self_attention.{norm}_layernorm.weight"] = hf[
                    f"{source}.self_attn.{norm}_norm.weight"
                ]
        joined |= _experts(hf, source, target) if f"{source}.mlp.gate.weight" in hf else _mlp(hf, source, target)
    return joined


def _mlp(hf: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    gate, up = hf[f"{source}.mlp.gate_proj.weight"], hf[f"{source}.mlp.up_proj.weight"]
    return {
        f"{target}.mlp.linear_fc1.weight": torch.cat([gate, up]),
        f"{target}.mlp.linear_fc2.weight": hf[f"{source}.mlp.down_proj.weight"],
    }


def _experts(hf: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """transformers keeps the experts of a layer in one tensor: [experts, 2 * ffn, H] and [experts, H, ffn]."""
    joined = {f"{target}.mlp.router.weight": hf[f"{source}.mlp.gate.weight"]}
    names = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}
    for megatron_name, hf_name in names.items():
        for expert, weight in enumerate(hf[f"{source}.mlp.experts.{hf_name}"]):
            joined[f"{target}.mlp.experts.local_experts.{expert}.{megatron_name}.weight"] = weight
    return joined
