"""Output that cannot be written ends nothing, and text from files cannot control the terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import unicodedata
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
from tqdm import tqdm

from lowres.terminal import Guarded, clean, guard, lost

BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
ENVIRONMENT = BUFFERED | {"PYTHONPATH": str(Path(__file__).parents[1])}

# what a command does: results on stdout, a bar and lines on stderr. It tells what it has seen in a file.
COMMAND = """
import os, subprocess, sys
from pathlib import Path
from tqdm import tqdm
from lowres.terminal import guard, lost

with guard():
    sys.stdin.readline()  # now the other end is in the state that is tested
    bar = tqdm(total=50, file=sys.stderr, mininterval=0, miniters=1)
    for step in range(50):
        print("x" * 2000)
        bar.update()
        tqdm.write(f"step {step}", file=sys.stderr)
    bar.close()
    sys.stdout.flush()
    child = subprocess.run(["sh", "-c", "echo out && echo err >&2"]).returncode
    Path(sys.argv[1]).write_text(f"{child} {[(n, type(e).__name__) for n, e in lost().items()]}")
sys.exit(7)
"""


def run_command(tmp_path: Path, buffered: bool = True, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *([] if buffered else ["-u"]), "-c", COMMAND, str(tmp_path / "seen")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=ENVIRONMENT, **streams)


def end_of(process: subprocess.Popen[str], tmp_path: Path) -> str:
    """Let the command go on, which must end with its own code; what it has seen."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(60) == 7
    return (tmp_path / "seen").read_text()


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_whose_reader_has_died(tmp_path: Path, name: str, buffered: bool) -> None:
    other = "stderr" if name == "stdout" else "stdout"
    process = run_command(tmp_path, buffered, **{name: subprocess.PIPE, other: subprocess.DEVNULL})
    getattr(process, name).close()
    assert end_of(process, tmp_path) == f"0 [('{name}', 'BrokenPipeError')]"


def test_a_reader_that_dies_in_the_middle(tmp_path: Path) -> None:
    process = run_command(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    head = subprocess.Popen(["head", "-n", "3"], stdin=process.stdout, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    seen = end_of(process, tmp_path)
    assert head.communicate()[0] == ("x" * 2000 + "\n") * 3
    assert seen == "0 [('stdout', 'BrokenPipeError')]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_both(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = run_command(tmp_path, stdout=full, stderr=full)
    assert end_of(process, tmp_path) == "0 [('stdout', 'OSError'), ('stderr', 'OSError')]"


def test_streams_that_were_closed_from_the_start(tmp_path: Path) -> None:
    """The next files to be opened do not get their numbers, so nothing that is printed goes into them."""
    script = """
import os, sys
from pathlib import Path
from lowres.terminal import guard

with guard():
    with open(sys.argv[1] + ".file", "w") as file:
        print("a result")
        print("a note", file=sys.stderr)
        os.system("echo a child; echo a child >&2")
        file.write("content")
    assert os.readlink("/proc/self/fd/1") == os.readlink("/proc/self/fd/2") == os.devnull
assert sys.stdout is sys.stderr is None
Path(sys.argv[1]).write_text("went on")
sys.exit(7)
"""
    seen = tmp_path / "seen"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script, str(seen)],
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 7
    assert seen.read_text() == "went on"
    assert (tmp_path / "seen.file").read_text() == "content"


def test_a_terminal_that_is_hung_up(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = run_command(tmp_path, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    assert end_of(process, tmp_path) == "0 [('stdout', 'OSError'), ('stderr', 'OSError')]"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_encoding_lacks(tmp_path: Path, encoding: str) -> None:
    script = """
import sys
from lowres.terminal import guard

with guard():
    print("caf\\xe9 \\u2014 \\u4e2d\\U0001f600 \\udcff")
    print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=ENVIRONMENT | {"PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
        check=True,
    )
    lines = done.stdout.decode(encoding).splitlines()
    word, dash = ("caf\xe9", "\u2014") if encoding == "cp1252" else ("caf\\xe9", "\\u2014")
    assert lines == [f"{word} {dash} \\u4e2d\\U0001f600 \\udcff", "done"]
    assert done.stderr == b""


def test_what_waits_until_the_end_does_not_fail_there(tmp_path: Path) -> None:
    """Python exits with 120 if its own flush at exit fails."""
    script = (
        "import sys; from lowres.terminal import guard\nwith guard(): sys.stdin.readline(); print('short')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout
    process.stdout.close()
    assert process.communicate(b"go\n")[1] == b""
    assert process.returncode == 0


def test_a_full_pipe_that_does_not_wait() -> None:
    """Its text is dropped, and training goes on; it is written again once the reader has caught up."""
    script = """
import os, sys
from lowres.terminal import guard, lost

def fill():
    for _ in range(1000):
        print("x" * 200, flush=True)
    assert not lost()
    print("full", file=sys.stderr, flush=True)
    sys.stdin.readline()

os.set_blocking(1, False)
with guard():
    fill()
    print()
    print("again", flush=True)
    print("again", file=sys.stderr, flush=True)
    sys.stdin.readline()
    fill()  # nobody reads any more, and Python flushes at exit
sys.exit(7)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        bufsize=0,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stderr.readline() == b"full\n"
    assert len(process.stdout.read(1 << 20)) > 1000
    process.stdin.write(b"go\n")
    assert process.stderr.readline() == b"again\n"
    assert b"\nagain\n" in process.stdout.read(1 << 20)
    process.stdin.write(b"go\n")
    assert process.stderr.readline() == b"full\n"
    process.stdin.write(b"go\n")
    assert process.wait(60) == 7
    assert process.stderr.read() == b""


def test_interrupts_and_errors_of_the_command_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), guard():
        print("before")
        raise KeyboardInterrupt
    assert not isinstance(sys.stdout, Guarded)
    assert capsys.readouterr().out == "before\n"


class Failing(io.StringIO):
    """A stream without a descriptor, whose other end is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_streams_without_a_descriptor() -> None:
    with redirect_stdout(Failing()), guard():
        print("one")
        print("two", flush=True)
        assert isinstance(lost()["stdout"], BrokenPipeError)
    assert lost() == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_is_lost_at_the_end_is_known() -> None:
    with open("/dev/full", "w") as full, redirect_stdout(full):
        with guard() as (out, err):
            print("waits in the buffer")
            assert out.lost is None
        assert isinstance(out.lost, OSError) and err.lost is None


def test_a_stream_that_somebody_closes() -> None:
    with redirect_stdout(io.StringIO()), guard():
        sys.stdout.close()
        print("one")
        sys.stdout.writelines(["two", "three"])
        sys.stdout.flush()
        assert isinstance(lost()["stdout"], ValueError)


def test_it_guards_what_is_there_and_puts_it_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with guard():
        assert isinstance(sys.stdout, Guarded)
        inner = sys.stdout
        with guard():  # as a command within a command
            assert sys.stdout is inner
            print("out")
        assert sys.stdout is inner
        print("err", file=sys.stderr)
        with redirect_stdout(io.StringIO()) as other:
            print("elsewhere")
        assert other.getvalue() == "elsewhere\n"
        assert sys.stdout is inner
        sys.stdout.writelines(["a", "b"])
    assert (sys.stdout, sys.stderr) == before
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("out\nab", "err\n")


def test_descriptors_are_captured_too(capfd: pytest.CaptureFixture[str]) -> None:
    with guard():
        print("from Python", flush=True)
        os.system("echo from a child")
    assert capfd.readouterr().out == "from Python\nfrom a child\n"


def test_it_has_what_its_stream_has() -> None:
    with open(os.devnull, "w", encoding="latin-1", errors="xmlcharrefreplace") as stream:
        guarded = cast(TextIO, Guarded("stdout", stream))
        assert guarded.fileno() == stream.fileno()
        assert (guarded.encoding, guarded.errors) == ("latin-1", "xmlcharrefreplace")
        assert guarded.buffer is stream.buffer
        assert guarded.isatty() is False and guarded.writable() and not guarded.closed
        assert guarded.write("four") == 4


def test_lines_go_above_a_bar() -> None:
    """tqdm recognises the stream of its bar, takes the bar away for the line, and draws it again."""
    stream = io.StringIO()
    with redirect_stdout(stream), guard():
        bar = tqdm(total=2, file=sys.stdout, ncols=40, mininterval=0, miniters=1)
        bar.update()
        before = len(stream.getvalue())
        tqdm.write("a line", file=sys.stdout)
        written = stream.getvalue()[before:]
        bar.close()
    assert written.startswith("\r" + " " * 39)
    assert "\ra line\n" in written
    assert "1/2" in written.split("a line\n")[1]


def test_bars_of_several_lines_move_the_cursor() -> None:
    stream = io.StringIO()
    with redirect_stdout(stream), guard():
        bars = [tqdm(total=2, file=sys.stdout, ncols=40, position=i, mininterval=0) for i in range(2)]
        for bar in bars:
            bar.close()
    assert "\n\r" in stream.getvalue() and "\x1b[A" in stream.getvalue()
    assert "\\x" not in stream.getvalue()


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\rb", "\x1b[Ab", "a\u202eb", "\x9b31m"])
def test_what_is_printed_cannot_control_the_terminal(name: str) -> None:
    stream = io.StringIO()
    with redirect_stdout(stream), guard():
        print(f"{name}: no such file")
        print(name, "no such file", file=sys.stdout)
        tqdm.write(f"note: {name}", file=sys.stdout)
        bar = tqdm(total=2, file=sys.stdout, ncols=80, desc=name)
        bar.close()
    printed = stream.getvalue()
    assert printed.startswith(f"{clean(name)}: no such file\n{clean(name)} no such file\n")
    assert f"note: {clean(name)}" in printed and printed.count(clean(name)) >= 4
    assert name not in printed
    without_returns = printed.replace("\r", "")  # the bar's own
    assert clean(without_returns) == without_returns


def test_clean() -> None:
    assert clean("a\x1b]0;title\x07\r\x9b31m\x7f") == "a\\x1b]0;title\\x07\\x0d\\x9b31m\\x7f"
    assert clean("abc\u202edcba\u2066\u200f\udcff") == "abc\\u202edcba\\u2066\\u200f\\udcff"
    plain = "caf\xe9\ta\n\u4e2d\u6587 \U0001f600 \\x1b"
    assert clean(plain) == plain


def test_clean_leaves_nothing_that_controls() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        controls = unicodedata.category(character) in ("Cc", "Cs")
        controls |= unicodedata.bidirectional(character) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        controls |= character in "\u200e\u200f\u061c"
        controls &= character not in "\n\t"
        assert (clean(character) != character) == controls, hex(code)
        if controls:
            assert clean(character).isascii() and clean(character).isprintable()
