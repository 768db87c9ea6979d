"""The commands, options and fields that the pages name are there. README's commands are in tests/test_readme.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_orz import ppo
from megatron_orz.config import Config, SupervisedConfig
from megatron_orz.types import Critic, Fleet, Policy, Reference
from tests.docs.test_pages import DOCS, PAGES
from tests.source import ROOT
from tests.test_readme import blocks, check_accepted

SECTION = (
    r"(?:ppo|kl|policy|critic|sampling|data|fleet|parallel|reward|evaluation|checkpoint|generations|tracking|model)"
)


def commands_of(text: str) -> list[str]:
    """Every command of a page's blocks that runs one of our programs, whole, without its comment and its variables."""
    lines = [
        line.split("  #")[0] for block in blocks(text) for line in "\n".join(block).replace("\\\n", " ").split("\n")
    ]
    found = [line.strip().removesuffix("; done") for line in lines]
    found = [re.sub(r"^(?:\w+=\S+ )+", "", line) for line in found]
    return [
        re.sub(r"\$\w+", "1", line)
        for line in found
        if re.match(r"(python|torchrun \S+ \d+) (tools|examples)/", line) and "..." not in line
    ]


COMMANDS = [
    pytest.param(command, id=f"{page.stem}: {command}")
    for page in DOCS.glob("*.md")
    for command in commands_of(page.read_text())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_accepted(command, tmp_path, monkeypatch, capfd)


def fields_of(config: type) -> set[str]:
    """The fields of a config and of the dataclasses in it, `fleet.kind`."""
    found = set()
    for name, hint in get_type_hints(config).items():
        found.add(name)
        for kind in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                found |= {f"{name}.{field}" for field in fields_of(kind)}
    return found


FIELDS = fields_of(Config) | fields_of(SupervisedConfig)
PARTS: dict[str, Any] = {"ppo": ppo, "policy": Policy, "critic": Critic, "fleet": Fleet, "reference": Reference}


def unknown_fields(text: str) -> set[str]:
    """What a text names in backticks as a field or an option of a recipe, and is none; nor a module, or of a part."""
    found = set()
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(rf"(?<![\w./-])({SECTION}\.[a-z_]+(?:\.[a-z_]+)*)(?![\w/*-])", quoted):
            part, _, member = name.partition(".")
            is_module = (ROOT / "megatron_orz" / part / f"{member}.py").exists() or member == "py"
            if name not in FIELDS and not is_module and not hasattr(PARTS.get(part), member):
                found.add(name)
        for option in re.findall(rf"--({SECTION}\.[a-z0-9.-]+)", quoted):
            name = option.replace("-", "_")
            if not {name, name.replace(".no_", ".")} & FIELDS:
                found.add(f"--{option}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_and_options_that_a_page_names_exist(page: Path) -> None:
    assert unknown_fields(page.read_text()) == set()


def test_a_field_that_does_not_exist_is_found() -> None:
    good = "`ppo.num_steps`, `--ppo.no-whiten-advantages`, `fleet.generate`, `data.packing`"
    assert unknown_fields(f"Set `ppo.num_step` or `--fleet.no-colocate`, not {good}.") == {
        *("ppo.num_step", "--fleet.no-colocate")
    }
