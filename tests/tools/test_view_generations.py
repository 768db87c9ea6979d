"""The viewer as a user meets it: what it is asked for is what it shows."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_orz.generations import Generation, generations_file, write_generations
from megatron_orz.printable import printable
from megatron_orz.types import Swap
from tools.view_generations import shortened

View = Callable[..., tuple[object, str]]


def generation(step: int, prompt_id: int, response: str, **values: object) -> Generation:
    base = Generation(
        step=step,
        prompt_id=prompt_id,
        source="train",
        prompt=f"problem {prompt_id}",
        response=response,
        answer="4",
        extracted="4",
        reward=1.0,
        is_correct=True,
        is_formatted=True,
        timed_out=False,
        finish_reason="stop",
        num_prompt_tokens=2,
        num_response_tokens=len(response),
        policy_version=step,
        reflection=[],
        repetition=0.0,
        prompt_ids=[1, 2],
        response_ids=[3] * len(response),
    )
    return replace(base, **values)  # type: ignore[arg-type]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    steps = {
        1: [
            generation(1, 10, "first of ten"),
            generation(1, 10, "second of ten, wrong", reward=0.0, is_correct=False, extracted="5"),
            generation(1, 11, "eleven", repetition=0.75, finish_reason="length", reward=0.0),
        ],
        2: [
            generation(
                2, 10, "ten again: Wait, what?", reflection=["wait,"], policy_version=0, swaps=(Swap(4, 1), Swap(9, 2))
            ),
            generation(2, 12, "evil \x1b[2J\u202e [bold]text"),
        ],
    }
    for step, rows in steps.items():
        write_generations(rows, generations_file(tmp_path, step), max_mib=1)
    return tmp_path


@pytest.fixture
def view(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> View:
    """Exit code (None for none) and what was printed."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object, path: Path = run_dir) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["tools/view_generations.py", str(path), *map(str, arguments)])
        code: object = None
        try:
            runpy.run_path("tools/view_generations.py", run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


RESPONSES = ["first of ten", "second of ten, wrong", "eleven", "ten again", "evil"]


@pytest.mark.parametrize(
    ("arguments", "expected", "num_passing"),
    [
        (("--step", 1), [0, 1, 2], 3),
        (("--step", 2, "--show", 1), [3], 2),
        (("--prompt", 10), [0, 1, 3], 3),
        (("--prompt", 10, 12, "--step", 2), [3, 4], 2),
        (("--reward", 0), [1, 2], 2),
        (("--reward", 0, "--finish", "length"), [2], 1),
        (("--contains", "wait,"), [3], 1),
        (("--sort", "repetition", "--show", 1), [2], 5),
        (("--sort", "length", "--show", 2), [3, 4], 5),
    ],
)
def test_it_shows_what_is_asked_for_in_its_order(
    view: View, arguments: tuple[object, ...], expected: list[int], num_passing: int
) -> None:
    code, printed = view(*arguments)
    assert code is None
    places = [printed.find(response) for response in RESPONSES]
    assert [i for i in sorted(range(5), key=places.__getitem__) if places[i] >= 0] == expected
    assert f"{len(expected)} of {num_passing} generations" in printed


def test_a_card_tells_the_verdict(view: View) -> None:
    _, printed = view("--reward", 0, "--show", 1)
    for fact in ("step 1 · prompt 10 · train", "problem 10", "answer 5 (wrong; reference 4)", "finish stop", "2 + 20"):
        assert fact in printed


def test_a_card_tells_whose_weights_sampled_which_tokens(view: View) -> None:
    _, printed = view("--contains", "wait,")
    assert "version 0, 1 from token 4, 2 from token 9" in " ".join(printed.replace("│", " ").split())


def test_without_filters_each_step_is_a_line(view: View) -> None:
    code, printed = view()
    assert code is None
    rows = [line.split() for line in printed.splitlines()]
    assert ["1", "3", "2", "1", "0.333", "13", "33", "%", "0", "%", "0.250"] in rows
    assert ["2", "2", "2", "0,", "1,", "2", "1.000", "22", "0", "%", "50", "%", "0.000"] in rows


def test_responses_cannot_steer_the_terminal(view: View) -> None:
    _, printed = view("--prompt", 12)
    assert r"evil \u001b[2J\u202e [bold]text" in printed
    assert "\x1b[2J" not in printed
    assert printable("a\tb\né⟨\r\x07") == "a\tb\né⟨\\u000d\\u0007"


def test_long_texts_lose_their_middle() -> None:
    assert shortened("abcdefghij", 4) == "ab\n[... 6 characters ...]\nij"
    assert shortened("abcd", 4) == "abcd"
    assert shortened("abcdefghij", 0) == "abcdefghij"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", 7), "none of the generations .* passes the filters"),
        (("--show", 0), "--show 0 shows nothing"),
    ],
)
def test_what_shows_nothing_says_so(view: View, arguments: tuple[object, ...], message: str) -> None:
    code, printed = view(*arguments)
    assert code == 2
    assert "Traceback" not in printed
    assert re.search(message, printed)


def test_a_directory_without_generations_is_named(view: View, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, printed = view(path=tmp_path / "empty")
    assert code == 2
    assert "generations.interval" in printed
