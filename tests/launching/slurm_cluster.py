"""A real SLURM on this machine: munge, a controller and several slurmd, all below one temporary directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from megatron_orz.rollout.servers import choose_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def why_not() -> str:
    """Why there can be no SLURM here; empty when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"{', '.join(missing)} are not installed (apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class SlurmCluster:
    """A context manager that ends every process it has started."""

    def __init__(self, home: Path, *, num_nodes: int) -> None:
        self._home = home
        self._num_nodes = num_nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}

    def call(self, *command: str) -> str:
        """What a SLURM command says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        text = self.call("scontrol", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Returns what `scontrol` says of a job once it is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (found := self.state(job))["JobState"] not in states:
            assert found["JobState"] not in DONE, found
            assert time.monotonic() < deadline, found
            time.sleep(1)
        return found

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60, check=False)
        time.sleep(2)
        self._end()

    def _start(self) -> None:
        home, port = self._home, choose_ports("127.0.0.1", 0, count=self._num_nodes + 1, options="")
        for folder in ("munge", "state", "spool", "log"):
            (home / folder).mkdir(parents=True)
        key = home / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._run(
            *("munged", "--foreground", "--force", "--num-threads=1", f"--key-file={key}"),
            *(f"--{name}-file={home}/munge/{name}" for name in ("pid", "log", "seed")),
            f"--socket={home}/munge/socket",
        )
        (home / "slurm.conf").write_text(self._configuration(port))
        (home / "cgroup.conf").write_text("CgroupMountpoint=/sys/fs/cgroup\n")
        self._run("slurmctld", "-D", "-i")
        for node in range(self._num_nodes):
            self._run("slurmd", "-D", "-N", f"node{node}")
        deadline = time.monotonic() + 120
        while True:
            done = subprocess.run(
                ["sinfo", "--noheader", "-o", "%T %D"], env=self.environment, capture_output=True, text=True, timeout=60
            )
            if done.stdout.strip() == f"idle {self._num_nodes}":
                return
            assert time.monotonic() < deadline, f"{done.stdout} {done.stderr} {self._logs()}"
            time.sleep(0.5)

    def _configuration(self, port: int) -> str:
        home, host = self._home, socket.gethostname()
        nodes = "\n".join(
            f"NodeName=node{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + node} CPUs=4 RealMemory=1000"
            for node in range(self._num_nodes)
        )
        return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld
SlurmdLogFile={home}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
PartitionName=second Nodes=node{self._num_nodes - 1} State=UP
"""

    def _run(self, *command: str) -> None:
        program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None
        with (self._home / "log" / f"{len(self._processes)}-{command[0]}").open("wb") as log:
            process = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        time.sleep(0.5)
        assert process.poll() is None, self._logs()

    def _logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in (self._home / "log").iterdir())

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)
