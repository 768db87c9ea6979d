"""A file is there whole, or as it was before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_orz.json_file import read_json, write_json
from megatron_orz.whole_file import whole_file

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_orz.whole_file import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_and_a_kill_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == [path]
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=300)
    assert done.returncode == -9
    assert path.read_bytes() == b"before"
    with whole_file(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x", "what the killed writer left is not in it"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, "ä"]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [1, "ä"]}
    assert list(tmp_path.iterdir()) == [path]
