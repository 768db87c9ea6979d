"""What is released: one version everywhere, and a wheel that works where nothing else of the project is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Collection
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import megatron_orz
from megatron_orz.logs import read_metrics
from tests.source import ROOT

OPTIONAL = ("ray", "sglang", "trl", "vllm", "reasoning_gym", "wandb", "trackio")
"""What the wheel does without, and says so where it is asked for."""

# Where the package came from, whether all of it is there, and whether its compiled op gives what the formula gives.
CHECK = f"""
import importlib, pkgutil, sys
from pathlib import Path
import torch
import megatron_orz
from megatron_orz.ops import extension, reference
from megatron_orz.ops.gae import packed_gae

assert Path(megatron_orz.__file__).is_relative_to(sys.prefix), megatron_orz.__file__
for module in pkgutil.walk_packages(megatron_orz.__path__, "megatron_orz."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in {OPTIONAL}, (module.name, error.name)
assert extension.NOT_BUILT is None, extension.NOT_BUILT
generator = torch.Generator().manual_seed(0)
rewards, values = torch.randn(2, 7, generator=generator)
pack = (rewards, values, torch.tensor([0, 3, 7], dtype=torch.int32), torch.ones(7, dtype=torch.bool))
expected = reference.packed_gae(*pack, gamma=0.9, gae_lambda=0.8)
for ours, exact in zip(packed_gae(*pack, gamma=0.9, gae_lambda=0.8), expected):
    torch.testing.assert_close(ours, exact)
print(megatron_orz.__version__)
"""


def test_there_is_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest
    assert (citation["version"], citation["date-released"]) == latest.groups()
    assert latest[1] == megatron_orz.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", megatron_orz.__version__)
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[tool.", 1)[0]


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without the checkout on its path; its output is in the error when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def requirements(package: Distribution) -> Collection[Distribution]:
    """The packages of this environment that a package asks for, and those that they ask for."""
    found: dict[str, Distribution] = {}
    seen = {(package.name, frozenset[str]())}
    waiting = [(package, frozenset[str]())]
    while waiting:
        asking, extras = waiting.pop()
        for requirement in map(Requirement, asking.requires or ()):
            wanted = (requirement.name, frozenset(requirement.extras))
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            )
            if applies and wanted not in seen:
                seen.add(wanted)
                required = distribution(requirement.name)
                found[required.name] = required
                waiting.append((required, wanted[1]))
    return found.values()


def link(package: Distribution, site_packages: Path) -> None:
    """Puts a package of this environment into another one, as links: to folders of its own, and to single files."""
    root = Path(str(package.locate_file("")))
    own = {
        top
        for top in {file.parts[0] for file in package.files or ()}
        if (root / top / "__init__.py").exists() or top.endswith(".dist-info")
    }
    for entry in {Path(file.parts[0]) if file.parts[0] in own else Path(file) for file in package.files or ()}:
        if ".." not in entry.parts and (root / entry).exists():
            (site_packages / entry).parent.mkdir(parents=True, exist_ok=True)
            (site_packages / entry).symlink_to(root / entry)


def environment_for(wheel: Path, place: Path) -> Path:
    """The Python of a new environment that holds what the wheel asks for, and nothing else."""
    venv.create(place)
    (site_packages,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [path for path in zipfile.Path(archive).iterdir() if path.name.endswith(".dist-info")]
        packages = requirements(PathDistribution(metadata))
    for package in packages:
        link(package, site_packages)
    return place / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_is_built_from_the_source_distribution_and_works_alone(home: Path, tmp_path: Path) -> None:
    """pip resolves the requirements without an index: what the wheel asks for is there, in the versions it allows."""
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ".", cwd=ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    names = {str(path.relative_to(source)) for path in source.rglob("*")}
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    ignorable = {".ci/run", ".dockerignore", ".gitignore"}
    assert tracked - names - ignorable == set(), "the source distribution lacks files"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    python = environment_for(wheel, tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-qq", "--no-index", wheel, cwd=tmp_path)
    run(*pip, "check", cwd=tmp_path)
    assert run(python, "-c", CHECK, cwd=tmp_path).strip() == megatron_orz.__version__

    recipe, tools = home / "recipe.py", source / "tools"
    assert "--ppo.num-steps" in run(python, recipe, "--help", cwd=tmp_path)
    run(python, recipe, "--ppo.num-steps", "1", cwd=tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    tensors = run(python, tools / "convert.py", "inspect", "--input", tmp_path / "run" / "final", cwd=tmp_path)
    assert "model.embed_tokens.weight" in tensors
    job = run(python, tools / "launch.py", recipe, "--slurm", "--venv", tmp_path / "venv", "--dry-run", cwd=tmp_path)
    assert job.startswith("#!"), "the wheel holds the template of batch scripts"
