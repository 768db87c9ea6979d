"""How a command ends: exit code, and what stands on stderr."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_orz import train
from megatron_orz.command_line import parse, plain_errors
from tests.test_examples import RECIPES, named, recipe_of


def end_of(error: BaseException) -> object:
    """The exit code of a command that meets this error."""
    with pytest.raises(SystemExit) as end, plain_errors():
        raise error
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("lr 0.0 is not positive"), 2, "error: lr 0.0 is not positive\n"),
        (RuntimeError("the server died"), 2, "error: the server died\n"),
        (OSError(28, "No space left on device", "run"), 2, "error: [Errno 28] No space left on device: 'run'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_a_command_is_one_sentence(
    capfd: pytest.CaptureFixture[str], error: BaseException, code: int, sentence: str
) -> None:
    assert end_of(error) == code
    assert capfd.readouterr().err == sentence


def test_other_ranks_say_what_may_be_wrong_with_them_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [end_of(ValueError("lr")), end_of(KeyboardInterrupt()), end_of(RuntimeError("lost rank 0"))] == [2, 130, 2]
    assert capfd.readouterr().err == "error on rank 1: lost rank 0\n"


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), plain_errors():
        raise AssertionError


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORZ_DEBUG", "1")
    with pytest.raises(ValueError, match="lr"), plain_errors():
        raise ValueError("lr")


@dataclass(frozen=True)
class Values:
    lr: float = 1.0


def test_the_command_line_changes_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--lr", "0.5"])
    assert parse(Values()) == Values(lr=0.5)


@pytest.mark.parametrize("path", RECIPES, ids=named)
@pytest.mark.parametrize(
    "argument", ["--help", "--ppo.num-stepz=3", "--ppo.num-steps=0", "--parallel.tp=2", "--dry-run"]
)
def test_a_recipe_prepares_nothing_for_a_command_that_does_not_train(
    path: Path, argument: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setattr("sys.argv", [str(path), argument])

    def prepare() -> None:
        pytest.fail("files were prepared")

    with pytest.raises(SystemExit):
        train.main(recipe_of(path), prepare=prepare)
