"""What docs/security.md promises, as far as it can be read from the source, or seen on the sockets of a run."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_orz.rollout.servers import free_port

ROOT = Path(__file__).parents[1]

MAY_PICKLE = {"megatron_orz/engine/checkpoint_metadata.py", "megatron_orz/conversion/torch_dist_file.py"}
"""One lets in descriptions of tensors alone, the other only writes."""

MAY_SEND_OBJECTS = {"megatron_orz/ranks.py", "megatron_orz/engine/megatron_engine.py"}
"""Between ranks of one run, which run the same program for the same user."""

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
OBJECT_COLLECTIVES = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


def sources() -> list[Path]:
    folders = ("megatron_orz", "examples", "tools")
    return [ROOT / "setup.py", *sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def called(node: ast.Call) -> str:
    """`a.b.c(...)` -> "a.b.c"; what is called may be an expression, of which the attributes at the end are left."""
    names: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        names.insert(0, function.attr)
        function = function.value
    return ".".join([function.id, *names] if isinstance(function, ast.Name) else ["", *names])


def is_true(node: ast.Call, name: str) -> bool:
    """Whether a keyword is given, and not as False."""
    return any(
        k.arg == name and not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in node.keywords
    )


def is_given(node: ast.Call, name: str) -> bool:
    return any(keyword.arg == name for keyword in node.keywords)


def dangers(path: str, source: str) -> Iterator[str]:
    """Every construct that could run what comes from outside."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if path not in MAY_PICKLE and PICKLES & {module.split(".")[0] for module in modules}:
                yield f"line {node.lineno}: a pickle"
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
            yield f"line {node.lineno}: {name} runs text"
        if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput") or is_true(
            node, "shell"
        ):
            yield f"line {node.lineno}: a shell"
        if name == "torch.load" and not is_true(node, "weights_only"):
            yield f"line {node.lineno}: torch.load without weights_only"
        if is_true(node, "trust_remote_code") or (
            last == "from_pretrained" and not is_given(node, "trust_remote_code")
        ):
            yield f"line {node.lineno}: code of a model's repository; transformers asks unless told not to run it"
        if is_true(node, "allow_pickle") or name in ("yaml.load", "yaml.unsafe_load", "pandas.read_pickle"):
            yield f"line {node.lineno}: a pickle in disguise"
        if last in OBJECT_COLLECTIVES and path not in MAY_SEND_OBJECTS:
            yield f"line {node.lineno}: {last} pickles"
        if last == "recv" and not node.args and not node.keywords:
            yield f"line {node.lineno}: Connection.recv unpickles; use recv_bytes"
        if any(
            k.arg == "verify" and isinstance(k.value, ast.Constant) and k.value.value is False for k in node.keywords
        ):
            yield f"line {node.lineno}: TLS without certificates"
        for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
            if isinstance(value, ast.Constant) and value.value in ("0.0.0.0", "::"):
                yield f"line {node.lineno}: listens on every interface"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_outside_is_run(path: Path) -> None:
    assert list(dangers(str(path.relative_to(ROOT)), path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(answer)",
        "exec(compile(text, 'x', 'exec'))",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "import pickle",
        "from dill import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path)",
        "numpy.load(path, allow_pickle=True)",
        "dist.all_gather_object(values, value)",
        "verdict = self._connection.recv()",
        "httpx.get(url, verify=False)",
        "server.bind('0.0.0.0')",
    ],
)
def test_a_danger_is_found(source: str) -> None:
    assert list(dangers("megatron_orz/some.py", source))


def test_harmless_namesakes_pass() -> None:
    source = "model.eval()\nre.compile('x')\ntorch.load(f, weights_only=True)\nsocket.recv(4)\nrun(x, shell=False)"
    assert list(dangers("megatron_orz/some.py", source)) == []


LISTENERS = """
import json, os, sys
import psutil, torch, torch.distributed as dist
from megatron_orz.engine.parallel import _join_process_group
from megatron_orz.peers import Peers

torch.set_num_threads(1)
size = int(sys.argv[1])
rank = 0
if size > 1:
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    rank = 0 if os.fork() else 1
    os.environ["RANK"] = str(rank)
_join_process_group(300.0)
groups = [dist.new_group(backend="gloo")]
dist.all_reduce(torch.ones(4))
dist.all_reduce(torch.ones(4), group=groups[0])
peers = Peers.connect()
if rank == 0:
    sockets = [c for p in (psutil.Process(), *psutil.Process().children()) for c in p.net_connections("inet")]
    print(json.dumps([list(c.laddr) for c in sockets if c.status == "LISTEN"]))
sys.stdout.flush()
dist.barrier()
os._exit(0) if rank else os.wait() if size > 1 else None
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_ranks_on_one_machine_listen_on_loopback_alone(world_size: int) -> None:
    names = ("WORLD_SIZE", "RANK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LISTENERS, str(world_size), str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout)
    assert len(listening) >= world_size  # gloo's own sockets, and the store's
    assert {address for address, _ in listening} == {"127.0.0.1"}


def test_a_server_gets_a_token_in_its_environment() -> None:
    from megatron_orz.rollout import vllm_server
    from megatron_orz.rollout.token import TOKEN_VARIABLE, server_token

    environment: Callable[..., dict[str, str]] = vllm_server._environment
    assert environment(on_cuda=False, cpu_threads=1)[TOKEN_VARIABLE] == server_token()
    assert len(server_token()) >= 32
