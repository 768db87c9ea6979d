"""The house rules that a program can check: sizes, cycles, one word for each thing, remedies, help with examples."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.source import ROOT, identifiers, parsed, python_files, relative, strings, user_errors

MAX_FILE_LINES = 400
MAX_LOOP_LINES = 60
SOURCES = python_files("megatron_orz", "tools", "examples")
NATIVE = [path for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(pattern)]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])

# What makes an error's text a remedy: what to do after a semicolon, or the values that are allowed.
REMEDY = re.compile(
    r"; \S|, but \S+ (is|are)|0 turns|0 saves|0 means|0 picks|is outside [\[(]|is neither|is not (at least|positive)"
    r"|is not a count|must be|must end|is not a finite number|it needs"
    r"|needs at least|give |set "
)
# Errors whose sentence a caller completes with the place and the remedy, and those of ops that a program calls wrongly.
COMPLETED_BY_CALLERS = {
    "megatron_orz/ablation/plan.py",
    "megatron_orz/data/forms.py",
    "megatron_orz/engine/checkpoint_metadata.py",
    "megatron_orz/engine/hf_checkpoint.py",
    "megatron_orz/json_file.py",
    "megatron_orz/ops/checks.py",
    "megatron_orz/ops/repetition.py",
    "megatron_orz/ops/slot_attention.py",
    "megatron_orz/rollout/client.py",
    "megatron_orz/rollout/local.py",
    "megatron_orz/rollout/sglang_client.py",
    "megatron_orz/rollout/vllm_client.py",
    "megatron_orz/rollout/vllm_spans.py",
}


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_needs_a_table_of_contents() -> None:
    files = [
        *SOURCES,
        *python_files("tests"),
        *NATIVE,
        *(ROOT / "tests").rglob("*.cpp"),
        *(ROOT / "tests").rglob("*.h"),
    ]
    assert {relative(path): num_lines(path) for path in files if num_lines(path) > MAX_FILE_LINES} == {}


def test_the_loop_is_a_page() -> None:
    (run,) = [node for node in parsed(ROOT / "megatron_orz" / "ppo.py").body if getattr(node, "name", None) == "run"]
    assert isinstance(run, ast.FunctionDef)
    assert run.end_lineno is not None
    assert run.end_lineno - run.lineno + 1 <= MAX_LOOP_LINES


def imports_when_loaded(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports at its top, where a cycle would be an error."""
    found = set()
    for node in parsed(path).body:
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name in modules}
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_comes_back_to_itself() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files("megatron_orz")
    }
    graph = {name: imports_when_loaded(path, modules) - {name} for name, path in modules.items()}
    assert "megatron_orz.types" in graph["megatron_orz.ppo"]
    assert cycle(graph) == []
    graph["megatron_orz.types"].add("megatron_orz.ppo")
    assert "megatron_orz.ppo" in cycle(graph), "a planted cycle is found"


def replaced_words() -> set[str]:
    """The last column of the glossary."""
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    return {word for row in rows for word in re.findall("`([^`]+)`", row.rsplit("|", 2)[1])}


def metric_words(tree: ast.Module) -> set[str]:
    """The parts of texts that look like metrics: reward/mean, time/generate_s."""
    return {
        word for text in strings(tree) if re.fullmatch(r"[a-z_]+/[a-z_@]+", text) for word in re.split("[/@]", text)
    }


def test_every_thing_has_one_name() -> None:
    replaced = replaced_words()
    assert {"actor_model", "logprobs", "response_mask"} <= replaced, "the glossary could not be read"
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        tree = parsed(path)
        if words := replaced & ({*identifiers(tree)} | metric_words(tree)):
            found[relative(path)] = words
    for path in PAGES:
        text = path.read_text() if path.name != "glossary.md" else ""
        if words := {word for word in replaced if re.search(rf"(?<![\w/.-]){word}(?![\w/.-])", text)}:
            found[relative(path)] = words
    assert found == {}


def test_an_error_that_a_user_can_mend_names_the_remedy() -> None:
    mute = [
        f"{relative(path)}:{line}: {text}"
        for path in SOURCES
        if relative(path) not in COMPLETED_BY_CALLERS
        for line, text in user_errors(parsed(path))
        if not REMEDY.search(text)
    ]
    assert mute == []


def command_lines() -> list[Path]:
    return sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*.py")])


@pytest.mark.parametrize("path", command_lines(), ids=lambda path: path.stem)
def test_help_begins_with_examples(path: Path) -> None:
    """`read_command`, `run_command` and `parse` show the docstring."""
    docstring = ast.get_docstring(parsed(path)) or ""
    assert re.search(rf"{path.parent.name}/{path.name}( |$)", docstring, re.MULTILINE), "no example in the docstring"
    readers = {"read_command", "run_command"} if path.parent.name == "tools" else {"parse", "main"}
    command = ROOT / "megatron_orz" / path.stem / "command.py"
    names = {name for file in (path, command) if file.exists() for name in identifiers(parsed(file))}
    assert readers & names, "the command line is read without the docstring"


def test_help_is_printed_with_its_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "plot.py"), run_name="__main__")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "python tools/plot.py runs/demo" in lines
    assert "python tools/plot.py runs/first runs/second --output both.png" in lines
    assert any("--output" in line for line in lines)
