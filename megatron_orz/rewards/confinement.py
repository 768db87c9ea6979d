"""The program around untrusted Python: confines itself, then runs it as a child that it outlives.

    python -I -S confinement.py <report descriptor> <parent pid> <scratch directory> <limits as JSON>

`sandbox.py` starts it; `main.py` in the scratch directory is what runs. The standard library only, and nothing of this
package: it starts in milliseconds. Linux only.

With namespaces (user and mount, network, process ids, IPC) the program sees the interpreter and the system's
libraries, read-only, an empty /tmp of bounded size, no network, no other process, and nothing else of the machine.
They need no privilege on most machines. Where the kernel refuses them, the resource limits alone remain, and the report
says so: the program could then read and write what its user may, and use the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
_NOBODY = 65534
_SPARE_USER = 1_000_000_000
_POLL_S = 0.002

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that the program's environment holds."""


class Limits(NamedTuple):
    """What a program may use."""

    wall_s: float = 10.0
    """From start to end, waiting included, on a machine that may be busy with other things."""
    cpu_s: float = 10.0
    """Processor time of each of its processes."""
    memory_gib: float = 1.0
    """Address space of each of its processes."""
    scratch_mib: float = 16.0
    """All its files together, each of its files, and each of its two output streams."""
    num_processes: int = 8
    """Processes and threads."""


def main(report_fd: int, parent_pid: int, scratch: Path, limits: Limits) -> None:
    """Runs the program, and writes one JSON object to the report: `isolation`, `exit_code`, `timed_out`."""
    os.set_inheritable(report_fd, False)  # the program must not write its own report
    end_with_parent()
    if os.getppid() != parent_pid:
        return
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    program = (scratch / "main.py").read_bytes()
    user, isolation = isolate(scratch, limits.scratch_mib)
    home = Path("/tmp") if isolation == "namespaces" else scratch
    child = os.fork()
    if child == 0:
        try:
            (home / "main.py").write_bytes(program)
            os.chdir(home)
            if user is not None:
                become(user)
            end_with_parent()
            apply_limits(limits)
            _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            os.execve(sys.executable, [sys.executable, "-P", "-s", "-B", "main.py"], ENVIRONMENT)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
        finally:  # whatever happens, the child must not run on as a second parent
            os._exit(127)
    exit_code = wait_until(child, time.monotonic() + limits.wall_s)
    timed_out = exit_code is None
    if timed_out:
        os.kill(child, signal.SIGKILL)
        exit_code = wait_until(child, float("inf"))
    elif exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        timed_out = usage.ru_utime + usage.ru_stime > 0.9 * cpu_limit(limits)
    end_children()
    report = {"isolation": isolation, "exit_code": exit_code, "timed_out": timed_out}
    os.write(report_fd, json.dumps(report).encode())


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it dies. A change of user undoes it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def isolate(mount_point: Path, scratch_mib: float) -> tuple[int | None, str]:
    """Moves this process, which must have one thread, into namespaces of its own; its next child is their process 1.

    mount_point: an empty-able directory on which the new root is mounted, for this process and its children alone.

    Returns the user the child must become, None where it has no privilege to lose, and `namespaces`; or None and
    `limits` where the kernel refuses.
    """
    user = os.geteuid()
    try:
        is_privileged = user == 0 and _unshare(_NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS)
        if not is_privileged:
            group = os.getegid()
            if not _unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS):
                return None, "limits"
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1")
        enter_new_root(mount_point, scratch_mib)
    except OSError:
        return None, "limits"
    # A user of its own for each program: the kernel counts processes by user.
    return (_SPARE_USER + os.getpid() if is_privileged else None), "namespaces"


def enter_new_root(mount_point: Path, scratch_mib: float) -> None:
    """Makes / a read-only view of the interpreter and the libraries with an empty writable /tmp. Raises OSError."""
    _mount(None, Path("/"), None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", mount_point, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    home = mount_point / "tmp"
    home.mkdir()
    _mount("tmpfs", home, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={int(scratch_mib * 2**20)},mode=1777")
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    for source in map(Path, [*system, *installations(sys.executable)]):
        target = mount_point / source.relative_to("/")
        if os.path.lexists(target) or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(source) in system and source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        target.mkdir() if source.is_dir() else target.touch()
        _mount(str(source), target, None, _MS_BIND | _MS_REC)
    _set_attributes(mount_point, _AT_RECURSIVE, add=_ATTR_RDONLY | _ATTR_NOSUID)
    _set_attributes(home, 0, remove=_ATTR_RDONLY)
    os.chroot(mount_point)  # in which the kernel gives out no user namespace, so that there is no way back
    os.chdir("/")


def installations(executable: str) -> list[str]:
    """The directories of an interpreter: of a virtual environment, and of all that its symbolic links lead to."""
    link, found = Path(executable), [sys.base_prefix]
    while link.is_symlink():
        found.append(str(link.parent.parent))
        link = link.parent / link.readlink()
    return [*found, str(link.resolve().parent.parent)]


def become(user: int) -> None:
    """Gives up all privileges for good."""
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:  # the machine is itself a container that has fewer users
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def cpu_limit(limits: Limits) -> int:
    """The limit of processor time in whole seconds, as the kernel takes it."""
    return max(1, round(limits.cpu_s))


def apply_limits(limits: Limits) -> None:
    """Sets the resource limits of this process, or leaves those that are lower yet."""
    for what, value in (
        (resource.RLIMIT_CPU, cpu_limit(limits)),
        (resource.RLIMIT_AS, int(limits.memory_gib * 2**30)),
        (resource.RLIMIT_FSIZE, int(limits.scratch_mib * 2**20)),
        (resource.RLIMIT_NPROC, limits.num_processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def wait_until(child: int, deadline: float) -> int | None:
    """The exit code of the child, -n for signal n; None when it runs past the deadline (of the monotonic clock)."""
    pause_s = _POLL_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if deadline < float("inf") else 0)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.05)


def end_children() -> None:
    """Ends what the program left behind: a namespace of processes ends with its first, orphans elsewhere come here."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in children.read_text().split() if children.exists() else []:
                os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)


def _unshare(flags: int) -> bool:
    return _LIBC.unshare(flags) == 0


def _mount(source: str | None, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, str(target), kind, data)]
    if _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise _last_error(target)


def _set_attributes(target: Path, flags: int, *, add: int = 0, remove: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, remove, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if _LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, str(target).encode(), flags, ctypes.byref(attributes), size):
        raise _last_error(target)


def _last_error(path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(path))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Limits(*json.loads(sys.argv[4])))
