"""What a hostile program can reach, use and leave behind, with and without namespaces."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_orz.rewards import sandbox
from megatron_orz.rewards.confinement import Limits, installations
from megatron_orz.rewards.sandbox import Outcome

PATIENT = Limits(wall_s=120.0)
"""For what is to end by itself, on a machine however busy."""
# A machine that refuses the namespaces of root alone, and one that refuses all.
REFUSALS = {"as_user": "not flags & confinement._NEWUSER", "limits": "True"}


@pytest.fixture(params=["as_root", "as_user", "limits"])
def isolation(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The isolation that the machine grants, or what is left of it where its kernel refuses some of the calls."""
    if request.param in REFUSALS:
        wrapper = tmp_path / "refusing.py"
        wrapper.write_text(
            "import importlib.util, json, sys\nfrom pathlib import Path\n"
            f"spec = importlib.util.spec_from_file_location('confinement', {str(sandbox._CONFINEMENT)!r})\n"
            "confinement = importlib.util.module_from_spec(spec)\nsys.modules['confinement'] = confinement\n"
            "spec.loader.exec_module(confinement)\nunshare = confinement._unshare\n"
            f"confinement._unshare = lambda flags: False if {REFUSALS[request.param]} else unshare(flags)\n"
            "confinement.main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), "
            "confinement.Limits(*json.loads(sys.argv[4])))\n"
        )
        monkeypatch.setattr(sandbox, "_CONFINEMENT", wrapper)
    expected = "limits" if request.param == "limits" else "namespaces"
    granted = run_python("pass").isolation
    if granted != expected:
        pytest.skip(f"this machine grants {granted}, not {expected}")
    return expected


def run_python(program: str, *, stdin: bytes = b"", limits: Limits = PATIENT) -> Outcome:
    return sandbox.run_python(program, stdin=stdin, limits=limits)


def output(outcome: Outcome) -> str:
    assert (outcome.exit_code, outcome.timed_out) == (0, False), outcome.stderr.decode()
    return outcome.stdout.decode().strip()


def test_a_program_reads_its_input_and_its_end_is_told(isolation: str) -> None:
    echo = "import sys\nprint(sys.stdin.read()[::-1])\nprint('warned', file=sys.stderr)\nsys.exit(3)"
    outcome = run_python(echo, stdin=b"abc")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (3, b"cba\n", b"warned\n")
    assert not outcome.timed_out
    assert outcome.isolation == isolation
    assert b"SyntaxError" in run_python("def").stderr
    assert output(run_python("print('\ud800')")) == "?"


def test_the_environment_and_the_open_files_are_its_own(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    program = """
        import os
        print(sorted(os.environ))
        for number in range(3, 64):
            try: os.fstat(number)
            except OSError: continue
            print('open', number)
    """
    names = output(run_python(dedented(program)))
    assert "TOKEN" not in names
    assert "PYTHONPATH" not in names
    assert "open" not in names


def dedented(program: str) -> str:
    lines = program.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def test_deadline_and_processor_time_end_it_with_all_it_started(isolation: str) -> None:
    sleeper = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60 + {})"
    start = time.monotonic()
    outcome = run_python(sleeper.format(0.125), limits=Limits(wall_s=1.0, num_processes=processes()))
    assert outcome.timed_out
    assert time.monotonic() - start < 60
    spinner = run_python("while True: pass", limits=Limits(wall_s=200.0, cpu_s=1.0))
    assert spinner.timed_out
    assert not run_python("import os\nos.kill(os.getpid(), 9)\nos._exit(3)").timed_out
    assert spinner.exit_code in (-9, -24)
    # One that ends by itself and leaves a process behind.
    output(run_python("import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(61)", limits=roomy()))
    mine = psutil.Process().children(recursive=True)
    assert [child for child in mine if "main.py" in " ".join(child.cmdline())] == []


def processes() -> int:
    """Outside of namespaces the kernel counts all processes of the user."""
    return 8 + len(psutil.pids()) * 4


def roomy() -> Limits:
    return PATIENT._replace(num_processes=processes())


def test_memory_files_and_output_are_bounded(isolation: str) -> None:
    limits = PATIENT._replace(memory_gib=0.25, scratch_mib=2.0)
    assert b"MemoryError" in run_python("x = bytearray(2**29)", limits=limits).stderr
    flood = run_python("import sys\nwhile True: sys.stdout.write('x' * 65536)", limits=limits)
    assert flood.exit_code != 0
    assert len(flood.stdout) <= 2 * 2**20
    file = run_python("open('big', 'wb').write(bytes(2**22))", limits=limits)
    assert file.exit_code != 0


@pytest.fixture
def in_namespaces(isolation: str) -> None:
    if isolation != "namespaces":
        pytest.skip("without namespaces the limits alone hold")


@pytest.mark.usefixtures("in_namespaces")
class TestNamespaces:
    def test_no_network(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
            outcome = run_python(program)
            assert outcome.exit_code == 1
            assert b"OSError" in outcome.stderr

    def test_no_file_of_the_machine_is_seen_or_written(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("42")
        assert b"FileNotFoundError" in run_python(f"print(open({str(secret)!r}).read())").stderr
        assert b"FileNotFoundError" in run_python("print(open('/etc/passwd').read())").stderr
        for path in ("/written", "/usr/written", f"{sys.base_prefix}/written", "/dev/written"):
            outcome = run_python(f"open({path!r}, 'w')")
            assert b"Read-only file system" in outcome.stderr or b"PermissionError" in outcome.stderr, outcome
            assert not Path(path).exists()
        assert output(run_python("open('mine', 'w').write('7'); print(open('mine').read())")) == "7"

    def test_all_files_together_are_bounded(self) -> None:
        program = "for i in range(100): open(str(i), 'wb').write(bytes(2**19))"
        outcome = run_python(program, limits=PATIENT._replace(scratch_mib=2.0))
        assert b"No space left" in outcome.stderr

    def test_no_other_process_is_seen_or_signalled(self) -> None:
        assert output(run_python("import os; print(os.getpid(), os.path.exists('/proc/self'))")) == "1 False"
        assert b"ProcessLookupError" in run_python(f"import os; os.kill({os.getpid()}, 9)").stderr

    def test_privileges_cannot_be_won_back(self) -> None:
        program = """
            import ctypes, os
            libc = ctypes.CDLL(None)
            assert os.getuid() != 0
            print(libc.unshare(0x10000000), libc.unshare(0x20000), libc.setuid(0))
            print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/tmp'))
        """
        assert output(run_python(dedented(program))) == "-1 -1 -1\n-1 -1"

    def test_a_fork_bomb_stays_small(self) -> None:
        program = """
            import os, time
            for count in range(100):
                try:
                    if os.fork() == 0: time.sleep(60)
                except OSError: break
            print(count)
        """
        if os.geteuid() == 0 and sandbox._CONFINEMENT.name != "confinement.py":
            pytest.skip("the kernel does not count the processes of root, which stays root without its own namespaces")
        assert int(output(run_python(dedented(program), limits=PATIENT._replace(num_processes=8)))) <= 8

    def test_threads_with_a_deep_stack_run(self) -> None:
        program = """
            import sys, threading
            sys.setrecursionlimit(10**6)
            threading.stack_size(64 * 2**20)
            def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
            thread = threading.Thread(target=lambda: print(depth(50000)))
            thread.start(); thread.join()
        """
        assert output(run_python(dedented(program))) == "50000"


def test_links_of_an_interpreter_are_followed(tmp_path: Path) -> None:
    for name in ("base", "between", "venv"):
        (tmp_path / name / "bin").mkdir(parents=True)
    (tmp_path / "base/bin/python3").touch()
    (tmp_path / "between/bin/python").symlink_to(tmp_path / "base/bin/python3")
    (tmp_path / "venv/bin/python").symlink_to("../../between/bin/python")
    found = {Path(path).resolve() for path in installations(str(tmp_path / "venv/bin/python"))}
    assert {tmp_path / name for name in ("base", "between", "venv")} <= found


def test_a_sandbox_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(sandbox, "_CONFINEMENT", tmp_path / "dies.py")
    with pytest.raises(RuntimeError, match="without a report"):
        run_python("pass")
