"""The tool as its user meets it: batch scripts that are sound and up to date, and refusals in one sentence."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_orz.launch.command import main
from megatron_orz.launch.lock import job_lock

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
Launch = Callable[..., tuple[object, str, str]]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Launch:
    """Exit code, stdout and stderr of a command line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "300")

    def call(*words: str) -> tuple[object, str, str]:
        code: object = None
        try:
            code = main(list(words))
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def of_tool(script: str) -> list[str]:
    """The command line that a batch script says it is of."""
    line = next(line for line in script.splitlines() if "tools/launch.py" in line)
    return shlex.split(line.removeprefix("#"))[2:]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_what_its_command_generates_and_a_sound_script(path: Path, launch: Launch) -> None:
    words = of_tool(path.read_text())
    end = words.index("--") if "--" in words else len(words)
    code, script, said = launch(*words[:end], "--dry-run", *words[end:])
    assert code == 0, said
    assert script == path.read_text(), f"generate it again: python tools/launch.py --output {path} ..."
    subprocess.run(["bash", "-n", path], check=True, timeout=60)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True, timeout=60)
        assert done.stdout == ""


def test_there_are_examples_for_1_2_4_and_16_nodes() -> None:
    names = [path.stem for path in SCRIPTS]
    assert all(any(f"_{count}node" in name for name in names) for count in (1, 2, 4, 16))
    assert all(any(f"_{count}node" in name and "colocated" in name for name in names) for count in (1, 2, 4, 16))
    assert any("container" in name for name in names)
    assert any(name.endswith("_het") for name in names)


def test_a_heterogeneous_job_has_two_groups_and_a_step_in_each(launch: Launch) -> None:
    _, script, _ = launch(
        *("examples/orz_7b.py", "--slurm", "--dry-run", "--nodes", "5", "--server-nodes", "3"),
        *("--partition", "train", "--server-partition", "serve", "--account", "us", "--signal-s", "90"),
    )
    first, second = script.split("#SBATCH hetjob")
    directives = [line.removeprefix("#SBATCH ") for line in second.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition=serve", "--nodes=3", "--gpus-per-node=8", "--account=us"} <= set(directives)
    assert "--signal=B:USR1@90" in first
    assert "--requeue" in first
    steps = {line.split()[1]: line for line in script.splitlines() if line.startswith("srun")}
    assert "--nodes=2" in steps["--het-group=0"]
    assert "--nodes=3" in steps["--het-group=1"]


def test_options_with_spaces_and_quotes_reach_the_recipe_whole(launch: Launch) -> None:
    odd = "a 'b' $HOME"
    words = ["examples/orz_7b.py", "--slurm", "--dry-run", "--nodes", "4", "--server-nodes", "2"]
    code, script, said = launch(*words, "--", "--run-dir", odd)
    assert code == 0, said
    line = next(line for line in script.splitlines() if "--role trainer" in line)
    assert shlex.split(line.removesuffix("&"))[-2:] == ["--run-dir", odd]
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["examples/none.py", "--slurm"], "there is no recipe examples/none.py; there are examples/demo.py"),
        (["tools/launch.py", "--slurm"], "tools/launch.py is no recipe; set RECIPE in it"),
        (["examples/orz_7b.py"], "none of --local, --slurm and --ray are given"),
        (["examples/orz_7b.py", "--slurm", "--local"], "2 of --local, --slurm and --ray are given"),
        (
            ["examples/orz_7b.py", "--local", "--output", "x"],
            "--output writes a batch script; leave it out",
        ),
        (["examples/orz_7b.py", "--slurm", "--", "--ppo.steps", "3"], "does not take --ppo.steps 3"),
        (
            ["examples/orz_7b.py", "--slurm", "--nodes", "3", "--server-nodes", "2", "--gpus-per-node", "6"],
            "1 nodes of 6 ranks do not fit the recipe: world size 6 is not a multiple of tp*pp*cp = 4*1*1",
        ),
        (["examples/orz_7b.py", "--slurm", "--server-nodes", "1"], "--server-nodes 1 leaves none of --nodes 1"),
        (
            ["examples/orz_7b.py", "--slurm", "--nodes", "4", "--server-nodes", "2", "--servers-per-node", "9"],
            "9 servers of fleet.server_tp 1 need 9 GPUs of a node, which has --gpus-per-node 8",
        ),
        (
            ["examples/orz_7b.py", "--slurm", "--ranks-per-node", "16"],
            "--ranks-per-node 16 needs as many GPUs, and a node has --gpus-per-node 8",
        ),
        (
            ["examples/orz_0p5b.py", "--slurm", "--gpus-per-node", "4"],
            "the recipe starts 8 servers of 1 GPUs beside the ranks of every node, which has --gpus-per-node 4",
        ),
        (
            ["examples/orz_0p5b.py", "--slurm", "--nodes", "3"],
            "fleet.num_servers 8 cannot be spread evenly over the 3 nodes of the ranks; set it to a multiple of 3",
        ),
        (
            ["examples/orz_0p5b.py", "--slurm", "--nodes", "2", "--", "--fleet.server-tp", "4"],
            "the recipe starts 4 servers of 4 GPUs beside the ranks of every node, which has --gpus-per-node 8",
        ),
        (
            ["examples/demo.py", "--slurm", "--nodes", "2", "--server-nodes", "1", "--", "--fleet.kind", "local"],
            "--server-nodes 1 starts vLLM servers, and fleet.kind is local",
        ),
        (
            ["examples/demo.py", "--slurm", "--nodes", "2", "--server-nodes", "1", "--", "--fleet.colocated"],
            "fleet.colocated takes turns on the trainer's GPUs",
        ),
        (["examples/demo.py", "--slurm", "--signal-s", "7200", "--time-limit-min", "60"], "--signal-s 7200 is not"),
        (["examples/demo.py", "--slurm", "--container", "pyxis"], "--container pyxis and --image None do not go"),
        (["examples/demo.py", "--slurm", "--partition", "a b"], "'a b' is no name that SLURM takes"),
        (["examples/demo.py", "--slurm", "--sbatch-options", "x\ny"], "--sbatch-options holds 'x\\ny'"),
        (["examples/demo.py", "--slurm", "--venv", "nowhere"], "there is no nowhere/bin/python"),
        (
            ["examples/demo.py", "--slurm", "--container", "apptainer", "--image", "none.sif"],
            "there is no image none.sif; build it, or set --image",
        ),
        (
            ["examples/demo.py", "--local", "--nodes", "2", "--", "--fleet.num-servers", "2"],
            "--local has one machine, and --nodes 2 with --server-nodes 0 asks for more",
        ),
        (
            ["examples/demo.py", "--local", "--gpus-per-node", "64"],
            "the job needs 64 GPUs, and this machine has",
        ),
        (
            ["examples/demo.py", "--local", "--gpus-per-node", "0", "--ranks-per-node", "4096"],
            "4096 ranks without GPUs need as many CPU cores",
        ),
        (["examples/demo.py", "--slurm", "--master-port", "70000"], "--master-port 70000 is no port"),
        (["examples/demo.py", "--slurm", "--start-timeout-s", "inf"], "--start-timeout-s inf is no deadline"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(
    words: list[str], message: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_orz.launch.command.submit", lambda *_, **__: pytest.fail("submitted"))
    monkeypatch.setattr("megatron_orz.launch.command.run_local", lambda *_, **__: pytest.fail("started"))
    code, _, said = launch(*words)
    assert code == 2
    assert message in said
    # tyro says in a box of its own what a dataclass finds wrong with its fields.
    assert said.count("error: ") + said.count(" Value error ") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modules", "cuda/12.8"], "error: there is no module cuda/12.8 on "),
        (["--container", "pyxis", "--image", "none.sqsh"], "error: there is no image none.sqsh on "),
        (["--venv", "nowhere"], "error: there is no nowhere/bin/python on "),
    ],
)
def test_software_that_a_node_lacks_ends_the_batch_script_before_anything_starts(
    options: list[str], message: str, launch: Launch, tmp_path: Path
) -> None:
    code, script, said = launch("examples/demo.py", "--slurm", "--dry-run", *options)
    assert code == 0, said
    # Whatever the script would start leaves a file. There is no module command, as on a node without that software.
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch started\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-s"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"srun", "scontrol"}


def test_a_run_directory_in_use_is_refused_with_its_owner(launch: Launch, tmp_path: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from megatron_orz.launch.lock import job_lock\n"
        "with job_lock(Path(sys.argv[1]), attempt='41.0'): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run.launch")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        words = ["examples/demo.py", "--local", "--gpus-per-node", "0", "--", "--run-dir", str(tmp_path / "run")]
        code, _, said = launch(*words)
        assert code == 2
        assert f"{tmp_path}/run is in use by attempt 41.0 (process {child.pid} on " in said
        with pytest.raises(ValueError, match=r"attempt 41\.0"), job_lock(tmp_path / "run.launch", attempt="42.0"):
            pass
    finally:
        child.kill()
        child.communicate(timeout=60)
    # What a killed holder leaves behind holds nobody up.
    with job_lock(tmp_path / "run.launch", attempt="42.0"):
        assert json.loads((tmp_path / "run.launch/owner.json").read_text())["attempt"] == "42.0"
    assert not (tmp_path / "run.launch/owner.json").exists()
