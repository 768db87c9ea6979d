"""A recipe with a tiny random model and its data, as a user's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_orz.data.synthetic import ArithmeticTask, build_tokenizer, make_problems, write_problems
from tests.engine import tiny
from tests.recipe import RECIPE


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of recipe.py."""
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.py").write_text(RECIPE)
    tokenizer = build_tokenizer()
    tiny.save_model(home / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(home / "model")
    train, held_out = make_problems(ArithmeticTask(), num_train=30, num_held_out=4, seed=0)
    write_problems(home / "train.jsonl", train)
    write_problems(home / "held_out.jsonl", held_out)
    return home
