"""A policy's only update finds log pi_old itself: the same numbers as asking for them before it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_orz.algorithms.kl import kl_loss
from megatron_orz.algorithms.losses import WeightedLosses, policy_loss
from megatron_orz.config import ModelConfig
from tests.engine import tiny
from tests.engine.layouts import OPTIMIZER, Layout, packs_of_rank
from tests.launch import run_ranks

LOSS = WeightedLosses([(1.0, partial(policy_loss, clip_eps=0.2)), (0.1, partial(kl_loss, estimator="k2"))])


def train_both_ways(layout: Layout, path: Path) -> None:
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    with open_mesh(layout.parallel, seed=0) as mesh:
        packs = packs_of_rank(tiny.random_sequences(7), layout, mesh.dp_rank)
        asked, shared = (
            PolicyEngine(ModelConfig(path=path, optimizer=OPTIMIZER), mesh, temperature=0.8) for _ in range(2)
        )
        for _ in range(2):
            old_log_probs = asked.infer(packs)
            known = [dataclasses.replace(e, old_log_probs=x) for e, x in zip(packs, old_log_probs, strict=True)]
            unknown = [dataclasses.replace(e, old_log_probs=torch.full_like(e.returns, torch.nan)) for e in packs]
            metrics, found = shared.step_on_policy(unknown, LOSS)
            # The forward passes differ in how they cut the logits, and in nothing else.
            for actual, expected in zip(found, old_log_probs, strict=True):
                assert actual.dtype == torch.float32
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            assert metrics == pytest.approx(asked.step(known, LOSS), rel=1e-4, abs=1e-6)


# The last stage alone has the log-probabilities; of a context slice, every rank has its own.
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (Layout(), Layout(tp=2), Layout(cp=2), Layout(dp=2))),
    ],
    ids=str,
)
def test_sharing_the_forward_pass_changes_nothing(layout: Layout, model_dir: Path) -> None:
    run_ranks(layout.world_size, train_both_ways, layout, model_dir)
