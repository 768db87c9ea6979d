"""Who may import whom. Read from the source with `ast`, so that a forbidden import fails even if it is never run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_orz"
EVERYTHING = ""

# Layer -> what of ours it may import: a layer, a module of it, or a name in it. A layer may always import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "config": {"types"},
    "ranks": {"closeable"},
    "command_line": set(),
    "whole_file": set(),
    "json_file": {"whole_file"},
    "peers": {"command_line"},
    "watchdog": {"command_line", "peers", "ranks.RemoteError"},
    "ops": set(),
    "algorithms": {"types", "ops"},
    "benchmark": {EVERYTHING},
    "data": {"types", "json_file", "whole_file"},
    "rewards": {"types", "ranks", "closeable"},
    "alerts": set(),
    "log_files": set(),
    "trackers": {"config"},
    "logs": {"types", "config", "alerts", "closeable", "json_file", "log_files", "terminal", "trackers", "whole_file"},
    "generations": {"types", "whole_file"},
    "closeable": set(),
    "printable": set(),
    "terminal": set(),
    "critic_analysis": {"ops", "generations", "metrics.repetition", "printable"},
    "metrics": {"types", "config", "ranks", "algorithms", "ops", "logs", "generations"},
    "curves": {"types", "logs.read_metrics", "whole_file"},
    "engine": {"types", "config", "ops", "algorithms.losses", "json_file"},
    "rollout_arrays": {"types"},
    "rollout": {"types", "config", "ranks", "ops", "closeable", "rollout_arrays"},
    "evaluation": {
        *("types", "data", "rewards"),
        *("closeable", "json_file", "printable", "terminal", "whole_file"),
    },
    "ablation": {
        *("types", "config", "command_line", "json_file", "checks", "trackers"),
        *("checkpoint.recipe", "checkpoint.run_directory.FINISHED_FILE", "logs", "curves", "evaluation.scores"),
    },
    "recipe_file": {"config", "command_line"},
    "resampling": {"types", "data"},
    "colocation": {"types"},
    "answers": {"types", "rollout_arrays"},
    "ahead": {"types", "data", "answers"},
    "timeline": {"closeable", "log_files"},
    "simulation": {"types", "data.packing", "generations", "json_file", "logs", "terminal", "timeline"},
    "doctor": {"command_line", "terminal"},
    "evaluate": {"types", "logs"},
    "ppo": {"types", "config", "algorithms", "data", "logs", "metrics"},
    "checkpoint": {"types", "config", "ranks", "logs", "data.stream", "whole_file"},
    "conversion": {"engine", "checkpoint", "json_file"},
    "compose": {"types", "config", "algorithms"},
    "debug": {"config"},
    "performance": {"types", "config", "engine"},
    "memory": {"types", "engine", "ranks"},
    "checks": {"types", "config", "command_line", "data", "engine"},
    "dry_run": {"config", "command_line", "checks", "engine"},
    "launch": {
        "closeable",
        "config",
        "command_line",
        "ranks",
        "checkpoint.preemption",
        "json_file",
        "recipe_file",
        "rollout",
    },
    "assembly": {EVERYTHING},
    "start": {EVERYTHING},
    "supervised_curves": {"curves", "logs.read_metrics"},
    "train": {EVERYTHING},
    "supervised": {EVERYTHING},
}

# Modules of other projects that only one layer knows.
OWNED_BY = {"megatron.core": "engine", "vllm": "rollout", "sglang": "rollout"}


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str) -> Iterator[str]:
    """Every dotted name an import statement reaches for, wherever it stands: `from a.b import c` is a.b.c."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return module == EVERYTHING or name == module or name.startswith(module + ".")


def violations(layer: str, source: str) -> list[str]:
    """The imports of a module that its layer may not make."""
    names = list(imported_names(source))
    ours = [name.removeprefix(f"{PACKAGE}.") for name in names if is_within(name, PACKAGE)]
    allowed = MAY_IMPORT[layer] | {layer}
    forbidden = [name for name in ours if not any(is_within(name, module) for module in allowed)]
    foreign = [
        name for name in names for module, owner in OWNED_BY.items() if is_within(name, module) and layer != owner
    ]
    return forbidden + foreign


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    if path == ROOT / PACKAGE / "__init__.py":
        assert list(imported_names(path.read_text())) == []
        return
    assert layer_of(path) in MAY_IMPORT, f"{layer_of(path)} is not in the table above"
    assert violations(layer_of(path), path.read_text()) == []


def test_no_layer_may_import_what_it_does_not() -> None:
    idle = {layer: allowed - {EVERYTHING} for layer, allowed in MAY_IMPORT.items()}
    for path in sources():
        names = [name.removeprefix(f"{PACKAGE}.") for name in imported_names(path.read_text())]
        layer = layer_of(path)
        idle[layer] = {module for module in idle.get(layer, ()) if not any(is_within(name, module) for name in names)}
    assert {layer: modules for layer, modules in idle.items() if modules} == {}


@pytest.mark.parametrize("folder", ["examples", "tools"])
def test_scripts_leave_megatron_and_vllm_to_their_layers(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = list(imported_names(path.read_text()))
        assert [name for name in names if any(is_within(name, module) for module in OWNED_BY)] == [], path


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("types", "from megatron_orz.config import Config"),
        ("ops", "import megatron_orz.algorithms.losses"),
        ("engine", "from megatron_orz.algorithms import advantages"),
        ("engine", "from megatron_orz import rollout"),
        ("curves", "from megatron_orz.logs import RunLog"),
        ("data", "def lazily():\n    from megatron_orz.train import train"),
        ("rollout", "import megatron.core.parallel_state"),
        ("engine", "from vllm import LLM"),
        ("ppo", "from megatron.core import parallel_state"),
    ],
)
def test_a_forbidden_import_is_found(layer: str, source: str) -> None:
    assert len(violations(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("engine", "from megatron_orz.algorithms.losses import token_weights\nfrom megatron.core import mpu"),
        ("curves", "from megatron_orz.logs import read_metrics"),
        ("data", "from megatron_orz.data.packing import pack\nimport torch"),
        ("train", "from megatron_orz.engine import optimizer\nfrom megatron_orz.rollout import fleet"),
        ("rollout", "import vllm_is_something_else"),
    ],
)
def test_an_allowed_import_passes(layer: str, source: str) -> None:
    assert violations(layer, source) == []
