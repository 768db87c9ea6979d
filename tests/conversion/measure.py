"""How much private memory and time a conversion takes, against `cp`.

python -m tests.conversion.measure --shape qwen2.5-7b --directory large_disk    # 50 GB
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
SHAPES = {  # hidden, ffn, layers, heads, key-value heads, vocabulary
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
}


def write_random_model(path: Path, shape: str) -> int:
    """A Hugging Face checkpoint of the shape, bfloat16, untied. Returns its bytes."""
    from megatron_orz.conversion.safetensors_file import SafetensorsWriter
    from megatron_orz.engine.architecture import read_architecture
    from megatron_orz.engine.weight_table import weight_table

    path.mkdir(parents=True)
    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    table = weight_table(read_architecture(path), value_head=False)
    tensors = {name: shape for entry in table for name, shape in entry.hf.items()}
    largest = max(math.prod(shape) for shape in tensors.values())
    noise = torch.randn(1 << 20).to(torch.bfloat16).repeat(largest // (1 << 20) + 1)
    with open(path / "model.safetensors", "wb", buffering=0) as stream:
        file = SafetensorsWriter(
            stream, {name: (shape, torch.bfloat16) for name, shape in tensors.items()}, lambda _: None
        )
        for name, shape_of in tensors.items():
            file.write(name, [noise[: math.prod(shape_of)].view(shape_of)])
    return sum(math.prod(shape) for shape in tensors.values()) * 2


def private_bytes() -> int:
    """Anonymous memory of this process: mapped file pages, which the system may take back, do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this is not Linux")


def run_conversion(direction: str, source: Path, target: Path) -> None:
    """In a process of its own: prints the largest private memory on the way."""
    from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf

    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu_start = time.monotonic(), time.process_time()
    plan = plan_hf_to_megatron if direction == "to_megatron" else plan_megatron_to_hf
    plan(source, target).run(lambda _: None)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    done.set()
    watcher.join()
    print(peak, seconds, cpu_seconds)


def forget(path: Path) -> None:
    """Drops the files from the system's cache, so that every contender reads them from disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True)
class Cost:
    seconds: float
    """Until the data is on disk; starting Python is left out."""
    cpu_seconds: float


def convert(direction: str, source: Path, target: Path) -> tuple[int, Cost]:
    """Returns (largest private memory in bytes, cost)."""
    forget(source)
    command = [sys.executable, "-m", "tests.conversion.measure", "--run", direction, str(source), str(target)]
    peak, seconds, cpu_seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(peak), Cost(float(seconds), float(cpu_seconds))


def copy(source: Path, target: Path) -> Cost:
    """Of `cp`."""
    forget(source)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(target)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs=3)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        direction, source, target = arguments.run
        return run_conversion(direction, Path(source), Path(target))
    root: Path = arguments.directory
    num_bytes = write_random_model(root / "hf", arguments.shape)
    print(f"{arguments.shape}: {num_bytes / GIB:.1f} GiB", flush=True)
    for direction, source, target in (("to_megatron", "hf", "megatron"), ("to_hf", "megatron", "again")):
        before = copy(root / source, root / "copy")
        peak, cost = convert(direction, root / source, root / target)
        after = copy(root / source, root / "copy")
        print(
            f"{direction}: {num_bytes / GIB / cost.seconds:.2f} GiB/s ({cost.cpu_seconds:.1f} CPU s), "
            f"peak {peak / GIB:.2f} GiB private; cp "
            + ", ".join(
                f"{num_bytes / GIB / x.seconds:.2f} GiB/s ({x.cpu_seconds:.1f} CPU s)" for x in (before, after)
            ),
            flush=True,
        )
        shutil.rmtree(root / source)
    return None


if __name__ == "__main__":
    main()
