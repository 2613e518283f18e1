"""A folder belongs to one process at a time, and to nobody once that process has ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowres.disk import DiskError
from lowres.errors import UserError
from lowres.lock import LOCK, held

# a process that keeps a folder until its input ends
KEEPER = """
import sys
from pathlib import Path
from lowres.lock import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def kept(folder: Path, script: str = KEEPER) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def test_a_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with kept(folder) as keeper:
        with pytest.raises(UserError) as refused, held(folder):
            pass
        start = f"{folder}: in use by process {keeper.pid} on {socket.gethostname()} since 2"
        assert str(refused.value).startswith(start)
        assert str(refused.value).endswith("; wait for it, or give another folder")
        with pytest.raises(UserError, match=f"{folder}: being prepared by process {keeper.pid} on"):
            held(folder, "being prepared").__enter__()
        assert (folder / LOCK).exists(), "a refused process has removed the file"
    with held(folder):
        pass


def test_the_same_process_does_not_get_it_twice(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        held(tmp_path).__enter__()


def test_other_folders_and_names_are_free(tmp_path: Path) -> None:
    with held(tmp_path / "a"), held(tmp_path / "b"), held(tmp_path / "a", name="other.lock"):
        assert (tmp_path / "a" / "other.lock").exists()


def test_a_killed_process_has_it_no_more(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper:
        keeper.send_signal(signal.SIGKILL)
        keeper.wait(60)
        assert (tmp_path / LOCK).exists()
        with held(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


CHILDREN = {
    "a worker that was forked": """
import multiprocessing
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
child = worker.pid
""",
    "a program": """
import subprocess
child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
""",
}


@pytest.mark.parametrize("name", CHILDREN)
def test_children_do_not_keep_it(tmp_path: Path, name: str) -> None:
    """What outlives a killed process does not keep its folder."""
    start = "".join(f"    {line}\n" for line in CHILDREN[name].splitlines())
    script = "import time\n" + KEEPER.replace(
        '    print("held", flush=True)\n',
        start + '    print("held", flush=True)\n    print(child, flush=True)\n',
    )
    with kept(tmp_path, script) as keeper:
        assert keeper.stdout
        child = int(keeper.stdout.readline())
        try:
            with pytest.raises(UserError, match="in use by"):  # the child has not taken it from its parent
                held(tmp_path).__enter__()
            keeper.kill()
            keeper.wait(60)
            os.kill(child, 0)
            with held(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_unwinding_in_a_fork_leaves_the_file(tmp_path: Path) -> None:
    keeping = held(tmp_path)
    keeping.__enter__()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            keeping.__exit__(None, None, None)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / LOCK).exists()
    keeping.__exit__(None, None, None)
    assert not (tmp_path / LOCK).exists()


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "b"
    (tmp_path / "runs").mkdir()
    with held(folder):
        assert sorted(path.name for path in folder.iterdir()) == [LOCK]
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with held(folder):
        (folder / "config.toml").write_text("")
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_an_empty_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"pid": "7"}', b'{"pid": 7}', b"{" * 5000])
def test_a_file_that_was_left_means_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with held(tmp_path):
        (tmp_path / LOCK).write_bytes(content)  # as of a process that could not write it
        with pytest.raises(UserError, match="in use by another process; wait"):
            held(tmp_path).__enter__()


def test_what_the_file_says_cannot_control_the_terminal(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / LOCK).write_text(json.dumps({"host": "a\x1b[2J", "pid": 7, "since": "today"}))
        with pytest.raises(UserError, match=r"process 7 on a\\x1b\[2J since today"):
            held(tmp_path).__enter__()


def test_a_file_that_is_replaced_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock, the process before may remove the file, and another may make a new one."""
    real, calls = fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            (tmp_path / LOCK).unlink()
            if calls == 2:
                (tmp_path / LOCK).write_text("new")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path):
        assert calls == 3
        with pytest.raises(UserError, match="in use by"):
            held(tmp_path).__enter__()


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, removed = tmp_path / "run", os.open, False

    def remove_first(path: Path, *more: int) -> int:
        nonlocal removed
        if not removed:
            folder.rmdir()
            removed = True
        return real(path, *more)

    monkeypatch.setattr(os, "open", remove_first)
    with held(folder):
        assert removed and (folder / LOCK).exists()
    assert not folder.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run") as found:
        assert found.note and found.note.startswith(f"{tmp_path / 'run'}: its file system has no locks (")
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "run"):
        (tmp_path / "run" / "config.toml").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_a_full_disk_still_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with held(tmp_path), pytest.raises(UserError, match="in use by another process"):
        held(tmp_path).__enter__()


def test_where_there_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for folder, message in (
        (tmp_path / "file", f"{tmp_path / 'file'}: this is not a folder"),
        (tmp_path / "file" / "run", f"{tmp_path / 'file'}: this is a file"),
        (tmp_path / "link", f"{tmp_path / 'link'}: this is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            held(folder).__enter__()
    (tmp_path / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(DiskError, match=f"{tmp_path / LOCK}: cannot be written"):
        held(tmp_path).__enter__()
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(DiskError, match=r"cannot be written .Permission denied.; give this user the right"):
        held(tmp_path).__enter__()
    monkeypatch.setattr(os, "mkdir", forbidden)
    with pytest.raises(DiskError, match=r"run: cannot be made .Permission denied.; give this user the right"):
        held(tmp_path / "run").__enter__()
