"""`tools/doctor.py`: what is installed, what is missing, what that costs, and what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_orz import terminal
from megatron_orz.command_line import read_command
from megatron_orz.doctor.findings import Finding, Verdict, ill, well
from megatron_orz.doctor.machine import DRIVER, check_machine
from megatron_orz.doctor.matrix import MATRIX, Target
from megatron_orz.doctor.packages import check_extension, check_imports, check_torch, check_versions, run_python

SERVER_TIMEOUT_S = 300.0
COLOURS: dict[Verdict, str] = {"ok": "green", "costly": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Arguments:
    """Looks at what is installed, beside the versions that are tested together.

    Exit code 0: it runs, if with costs; 1: something that every run needs is missing or broken.
    """

    target: Target | None = None
    """What the machine is for; by default cuda where there is an NVIDIA driver."""
    json: bool = False
    """Print the findings as JSON."""
    imports: bool = True
    """Import the packages, each in a process of its own; without, it takes a second."""
    server: Path | None = None
    """Also start a vLLM server with this checkpoint, and stop it."""
    folder: Path = Path()
    """Where runs would be written."""
    timeout_s: float = 300.0
    """Deadline of each import."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s {self.timeout_s:g} is not a deadline; give seconds above 0")
        if not self.folder.is_dir():
            raise ValueError(f"folder {self.folder} is no directory; give one that exists")
        if self.server is not None and not (self.server / "config.json").is_file():
            raise ValueError(f"server {self.server} holds no config.json; give a Hugging Face checkpoint")


def run(console: Console) -> int:
    """Reads the command line, prints the findings, and returns the exit code."""
    arguments = read_command(Arguments)
    target: Target = arguments.target or ("cuda" if DRIVER.exists() else "cpu")
    with Console(stderr=True).status("looking"):
        findings = list(look(arguments, target))
    if arguments.json:
        document = {"target": target, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=1))
    else:
        console.print(table(findings, target))
        console.print(summary(findings))
    return int(any(finding.verdict == "broken" for finding in findings))


def look(arguments: Arguments, target: Target) -> Iterator[Finding]:
    """All findings: packages, then the machine."""
    yield from check_versions(MATRIX, target)
    if arguments.imports:
        yield from check_imports(MATRIX, target, timeout_s=arguments.timeout_s)
        yield from check_torch(target, timeout_s=arguments.timeout_s)
        yield check_extension(target, timeout_s=arguments.timeout_s)
    yield from check_machine(target, folder=arguments.folder)
    if arguments.server is not None:
        yield check_server(arguments.server)


def check_server(model: Path) -> Finding:
    """Starts a vLLM server as a run would, and stops it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = SERVER_PROBE.format(model=str(model.resolve()), run_dir=folder, timeout_s=SERVER_TIMEOUT_S)
        # The fleet has the deadline; this one is for an end that hangs.
        problem, _ = run_python(code, timeout_s=SERVER_TIMEOUT_S + 60)
    if problem:
        remedy = f"python tools/serve.py {model} shows the server's log; --fleet.kind local does without"
        return ill("vLLM server", problem, cost="no rollouts from servers on this machine", remedy=remedy)
    return well("vLLM server", f"starts and stops in {time.perf_counter() - start:.0f} s")


SERVER_PROBE = """
from pathlib import Path
from megatron_orz.config import FleetConfig, ModelConfig, OptimizerConfig, SamplingConfig
from megatron_orz.rollout.fleet import open_fleet
fleet = FleetConfig(kind="vllm", max_model_tokens=128, kv_cache_gib=0.25, start_timeout_s={timeout_s})
model = ModelConfig(path=Path({model!r}), optimizer=OptimizerConfig(lr=1.0))
with open_fleet(fleet, SamplingConfig(max_response_tokens=16), model, run_dir=Path({run_dir!r})):
    pass
"""


def table(findings: Sequence[Finding], target: Target) -> Table:
    """A line for each finding."""
    result = terminal.table(f"megatron_orz on {target}", ["", "found", "what it costs", "remedy"])
    for finding in findings:
        result.add_row(
            Text(finding.subject, style=COLOURS[finding.verdict]),
            *(Text(text) for text in (finding.found, finding.cost, finding.remedy)),
        )
    return result


def summary(findings: Sequence[Finding]) -> str:
    """How many of each verdict."""
    counts = Counter(finding.verdict for finding in findings)
    return f"{counts['ok']} in order, {counts['costly']} with a cost, {counts['broken']} broken"
