"""One supervised run, complete."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_orz.config.checks import check_numbers, require
from megatron_orz.config.models import ModelConfig, ParallelConfig
from megatron_orz.config.outputs import CheckpointConfig, TrackingConfig
from megatron_orz.types import LearnedTokens


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """The conversations to learn from, and the packs made of them."""

    train: tuple[Path, ...]
    """.jsonl files with a conversation a line: {"messages": [...]}, or {"prompt": ..., "response": ...}."""
    held_out: tuple[Path, ...] = ()
    """Files of the same forms, on which the loss is measured and not learnt."""
    template: str = "tokenizer"
    """`tokenizer`: its chat template; or a prompt as for reinforcement learning (`orz`, `short`, a text with
    `{problem}`), which the exported tokenizer then has as its chat template."""
    learn: LearnedTokens = "responses"
    """Learn what the assistant says, or `all` tokens."""
    max_tokens: int = 4096
    """Longer conversations are dropped and counted."""
    max_pack_tokens: int = 16384
    """Token budget of a pack, which is also the micro-batch."""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train names no file; give at least one file of conversations")
        require(
            self.max_tokens >= 2, f"data.max_tokens {self.max_tokens} < 2: nothing follows a single token; raise it"
        )
        names = [path.stem for path in self.held_out]
        require(
            len(set(names)) == len(names),
            f"data.held_out holds two files of one name ({', '.join(names)}), as their metrics would be; rename one",
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """One supervised run, complete."""

    run_dir: Path
    """Everything the run writes: metrics, curves, config.json, checkpoints, and the trained model in `final/`."""
    model: ModelConfig
    """Its optimizer's rate falls, if at all, over the whole run where `decay_steps` is not set."""
    data: ConversationConfig
    num_epochs: float = 1.0
    """Passes over the conversations; the last one may be a part."""
    num_conversations: int = 256
    """Conversations of an optimizer step."""
    held_out_interval: int = 50
    """Measure the held-out loss before the first step, after every `held_out_interval` steps, and after the last."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(interval=100))
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    hang_timeout_s: float = 1800.0
    """The run ends when nothing moves on any rank for this long."""
    fresh: bool = False
    """Start over: set aside what run_dir holds, instead of resuming from its last checkpoint."""
    dry_run: bool = False
    """Check everything that can be checked without building a model, print the resolved config, and stop."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(self.seed >= 0, f"seed {self.seed} is negative; set it to 0 or more")
        require(self.num_epochs > 0, f"num_epochs {self.num_epochs} is not positive")
        require(self.num_conversations >= 1, f"num_conversations {self.num_conversations} is not at least 1")
        require(self.held_out_interval >= 1, f"held_out_interval {self.held_out_interval} is not at least 1")
        multiple = self.parallel.pack_multiple
        least = -(-(self.data.max_tokens - 1) // multiple) * multiple
        require(
            least <= self.data.max_pack_tokens,
            f"a conversation of data.max_tokens {self.data.max_tokens} does not fit data.max_pack_tokens "
            f"{self.data.max_pack_tokens}; raise it to at least {least}, or lower data.max_tokens",
        )
        require(
            self.hang_timeout_s > self.parallel.timeout_s,
            f"hang_timeout_s {self.hang_timeout_s:g} is not above parallel.timeout_s {self.parallel.timeout_s:g}, "
            "whose end says more of what hangs; raise hang_timeout_s",
        )

    def num_steps(self, num_available: int) -> int:
        """Optimizer steps of the run on so many conversations: at least 1."""
        return max(1, round(self.num_epochs * num_available / self.num_conversations))

    def resolved_model(self, num_steps: int) -> ModelConfig:
        """The model's config, in which a rate that falls has reached its end at the last of `num_steps` steps.

        Raises ValueError where the warm-up takes as long.
        """
        optimizer = self.model.optimizer
        if optimizer.decay == "constant" or optimizer.decay_steps is not None:
            return self.model
        require(
            num_steps > optimizer.warmup_steps,
            f"the run has {num_steps} steps, and model.optimizer.warmup_steps {optimizer.warmup_steps} leave none for "
            f"its decay {optimizer.decay}; lower them, or raise num_epochs",
        )
        return replace(self.model, optimizer=replace(optimizer, decay_steps=num_steps))
