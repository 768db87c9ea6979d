"""What is released: one version everywhere, and a wheel that works where nothing else of the project is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

import megatron_orz
from tests.source import ROOT

LOCK = ROOT / "requirements-cpu.lock"

# Where the package came from, and whether its compiled op gives what the formula gives.
CHECK = """
import sys
from pathlib import Path
import torch
import megatron_orz
from megatron_orz.ops import extension, reference
from megatron_orz.ops.gae import packed_gae
from megatron_orz import ppo, train
from megatron_orz.config import Config

assert Path(megatron_orz.__file__).is_relative_to(sys.prefix), megatron_orz.__file__
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


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_wheel_is_built_from_the_source_distribution_and_works_alone(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ".", cwd=ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    ignorable = {".ci/run", ".dockerignore", ".gitignore"}
    assert tracked - names - ignorable == set(), "the source distribution lacks files"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    run(python, "-m", "pip", "install", "-qq", torch, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-qq", "--constraint", LOCK, wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    assert run(python, "-c", CHECK, cwd=tmp_path).strip() == megatron_orz.__version__
