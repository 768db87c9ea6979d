"""The tool from a critic's checkpoint and generations to the page."""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_orz.generations import generations_file, write_generations
from tests.critic_analysis.critics import generation, save_critic
from tests.critic_analysis.test_page import Page

pytestmark = pytest.mark.usefixtures("one_thread")
Report = Callable[..., tuple[object, str]]


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("critic")
    save_critic(path)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two steps of six prompts with two responses each, some of which loop."""
    draw = random.Random(0)
    for step in range(2):
        rows = []
        for number in range(12):
            ids = [draw.randrange(20) for _ in range(30)]
            rows.append(generation(number // 2, ids[:8] * 4 if number % 3 == 0 else ids, prompt_ids=[1, 2]))
        write_generations(rows, generations_file(tmp_path, step), max_mib=1)
    return tmp_path


@pytest.fixture
def report(critic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Exit code (None for none) and what was printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[object, str]:
        command = ["tools/critic_report.py", "--critic", critic, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        code: object = None
        try:
            runpy.run_path("tools/critic_report.py", run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_a_run_becomes_a_page(report: Report, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    code, printed = report("--generations", run_dir, "--output", output, "--show", 6, "--min-repeat-tokens", 8)
    assert code is None, printed
    assert "value change" in printed
    page = Page(output.read_text())
    assert len(page.attributes("section")) == 6
    # The three most repetitive of the six shown: 4 rounds of 8, of which the first is new.
    assert sum(" r" in str(token["class"]) for token in page.attributes("b")) >= 3 * 24
    assert not list(tmp_path.glob(".*.unfinished"))


def test_one_file_is_analysed_alone(report: Report, run_dir: Path, tmp_path: Path) -> None:
    _, of_run = report("--generations", run_dir, "--output", tmp_path / "run.html")
    _, of_file = report("--generations", generations_file(run_dir, 0), "--output", tmp_path / "file.html")
    assert "24 with a mean reward" in (tmp_path / "run.html").read_text()
    assert "12 with a mean reward" in (tmp_path / "file.html").read_text()
    assert of_run != of_file


def test_bad_input_is_one_sentence(report: Report, run_dir: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("--generations", tmp_path / "none"), "is neither a file of generations nor"),
        (("--generations", run_dir, "--min-repeat-tokens", 0), "--min-repeat-tokens 0 is not at least 1"),
        (("--generations", run_dir, "--gamma", 1.5), "--gamma 1.5 is outside [0, 1]"),
        (("--generations", run_dir, "--critic", tmp_path), "holds no config.json; give a critic's"),
    ]:
        code, printed = report(*arguments, "--output", tmp_path / "report.html")
        assert code == 2
        assert message in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "report.html").exists()
