"""The README is true: its loop is the code's, its commands are accepted, its table is what the figures give."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tyro
from rich.console import Console

from tests.source import ROOT

README = (ROOT / "README.md").read_text()

# What the page leaves out of the loop: timing, progress bars, metrics, and the last evaluation.
BOOKKEEPING = re.compile(
    r"^(with |start = |scores = |metrics(, num_tokens)? = |metrics \|= (policy|importance)_metrics|del |log\.|return$"
    r"|if step == ppo\.num_steps:$)"
)


def blocks(text: str) -> list[list[str]]:
    """The indented blocks of a page, as lines without the indentation; blank lines do not end a block."""
    found = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    return [lines for block in found if (lines := textwrap.dedent(block).strip("\n").splitlines())]


def loop_of(source: str) -> list[str]:
    """The lines of the loop, without blank ones, indentation and bookkeeping."""
    body = source.split("    for step in range", 1)[1].split("\n\n\ndef ", 1)[0]
    lines = [line.strip() for line in ("for step in range" + body).splitlines()]
    return [line for line in lines if line and not BOOKKEEPING.match(line)]


def test_the_loop_on_the_page_is_the_loop_of_the_code() -> None:
    (shown,) = [block for block in blocks(README) if block[0].startswith("for step in range")]
    assert [line.strip() for line in shown if line] == loop_of((ROOT / "megatron_orz" / "ppo.py").read_text())
    assert len([line for line in shown if line]) <= 20


def commands() -> list[str]:
    """Every command of the page, without its comment."""
    lines = [line.split("  #")[0].strip() for block in blocks(README) for line in block]
    return [line for line in lines if re.match(r"(python|torchrun|make) ", line)]


class Accepted(BaseException):
    """The command line was read; nothing of what it asks for is done."""


def accept(monkeypatch: pytest.MonkeyPatch, script: str, arguments: list[str]) -> None:
    """Reads a command line as the script does, up to where it would begin its work."""

    def stop_after(read: Any) -> Any:
        def reading(*args: Any, **options: Any) -> None:
            read(*args, **options)
            raise Accepted

        return reading

    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", stop_after(tyro.extras.subcommand_cli_from_dict))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def check_accepted(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Options exist and their values are allowed; help is printed whole."""
    monkeypatch.chdir(place)
    script, *arguments = shlex.split(command.split(" ", 1)[1] if command.startswith("python ") else launched(command))
    with pytest.raises((Accepted, SystemExit)) as end:
        accept(monkeypatch, script, arguments)
    assert isinstance(end.value, Accepted) or "--help" in arguments, capfd.readouterr().err
    assert isinstance(end.value, Accepted) or end.value.code in (0, None)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("command", [command for command in commands() if not command.startswith("make ")])
def test_a_command_is_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_accepted(command, tmp_path, monkeypatch, capfd)


def launched(command: str) -> str:
    """What torchrun starts."""
    match = re.fullmatch(r"torchrun --nproc-per-node \d+ (examples/.*)", command)
    assert match, command
    return match[1]


def test_an_option_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        accept(monkeypatch, "examples/demo.py", ["--ppo.num-stepz", "10"])
    assert end.value.code == 2


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_a_target_of_make_exists(command: str) -> None:
    subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=300)


def test_the_table_is_what_the_figures_give() -> None:
    summary = pytest.importorskip("megatron_orz.benchmark.summary")
    shown = re.search(r"<!-- python tools/benchmark\.py table -->\n(.*)\n<!-- end of the table -->", README, re.DOTALL)
    assert shown
    console = Console(file=io.StringIO(), width=10_000)
    summary.run(summary.Arguments(), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == shown[1]


SMALL = "--fleet.kind local --ppo.num-steps 2 --ppo.num-prompts 8 --ppo.num-responses 2 --evaluation.max-prompts 8"
SEQUENCE = [
    "examples/demo_base.py --num-epochs 0.1",
    f"examples/demo.py {SMALL}",
    f"examples/demo.py {SMALL} --fresh",
    "examples/demo.py --dry-run",
    "tools/plot.py runs/demo --output curves.png",
    "tools/view_generations.py runs/demo --reward 0 --show 3",
    "tools/critic_report.py --critic runs/demo/final-critic --generations runs/demo --output report.html",
    "tools/convert.py hf-to-megatron --input runs/demo/final --output megatron",
    "tools/convert.py verify --first runs/demo/final --second megatron",
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_work_one_after_another(tmp_path: Path) -> None:
    """From nothing, with short trainings in place of the demo's; tests/test_examples.py runs the demo itself."""
    for command in SEQUENCE:
        line = [sys.executable, *shlex.split(str(ROOT) + "/" + command)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "<html" in (tmp_path / "report.html").read_text()[:200]
