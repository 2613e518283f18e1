"""Scripts of this project in copies of this process, which saves the seconds to import torch and others.

A copy has its own memory, environment and standard streams, as a new process has. What an interpreter and its
libraries read when they start is that of this process.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any


class Fork:
    """What is needed of `subprocess.Popen([sys.executable, script, ...])`. stdin, stdout: PIPE or None;
    stderr: a file or None."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
    ) -> None:
        assert command[0] == sys.executable and text
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        theirs = dict[int, int]()
        if stdin == subprocess.PIPE:
            theirs[0], ours = os.pipe()
            self.stdin = os.fdopen(ours, "w")
        if stdout == subprocess.PIPE:
            ours, theirs[1] = os.pipe()
            self.stdout = os.fdopen(ours)
        if stderr is not None:
            theirs[2] = os.dup(stderr.fileno())
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _run(command[1:], theirs, env)
        for descriptor in theirs.values():
            os.close(descriptor)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def run(command: Sequence[str], check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """What is needed of `subprocess.run`."""
    one = Fork(command, **options)
    out = one.stdout.read() if one.stdout else ""
    done = subprocess.CompletedProcess([*command], one.wait(), out, "")
    if check:
        done.check_returncode()
    return done


def _run(arguments: Sequence[str], streams: Mapping[int, int], env: Mapping[str, str] | None) -> None:
    """Be the script; never returns."""
    code = 1
    try:
        for number, descriptor in streams.items():
            os.dup2(descriptor, number)
        os.closerange(3, 1024)  # pipes of other copies would not end
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2)
        )
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        else:
            code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
