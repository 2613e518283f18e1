"""The command line; the only place that parses arguments.

parser       what it understands; imports nothing else
training     train, launch, sweep
planning     plan, bench
data         data inspect, overlap, prepare
models       import, export
use          sample, eval
looking      report, watch
checkpoints  checkpoint list, verify
configs      config, and the config that a command was given
completion   completion, and what a shell asks for with it
tasks        options for tasks of lm-evaluation-harness

The file of a command is imported when the command runs.

Exit codes: 0 fine (also a run that was asked to stop, and has saved), 1 a check failed, 2 bad input, 3 does
not fit, 128 + n ended by signal n, 141 its output was lost.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Callable

from lowres import disk, ranks, terminal
from lowres.cli.parser import make_parser
from lowres.errors import UserError, first_line
from lowres.stopping import Left, loud

LOST = 128 + 13  # as a program that SIGPIPE ends
# what to do after a Ctrl-C, if the command does not say it itself
REMEDIES = {
    "training:run_launch": "; if the run has begun, go on with --resume",
    "training:run_sweep": "; start it again to go on",
    "data:run_prepare": "; start it again to go on",
    "looking:run_report": "; nothing was written; start it again",
    "models:run_export": "; nothing was written; start it again",
    "models:run_import": "; nothing is left of it; start it again",
}
# commands whose result is what they print
PRINTING = {
    "planning:run_plan",
    "planning:run_bench",
    "use:run_sample",
    "use:run_eval",
    "looking:run_watch",
    "checkpoints:run_list",
    "checkpoints:run_verify",
    "configs:run_config",
    "completion:run_completion",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with terminal.guard() as (out, _), loud():
        parsed = make_parser().parse_args(arguments)
        if parsed.command is None:
            parsed.help()
            return 0
        code = explained(lambda: _run(parsed), parsed.command)
    if code == 0 and out.lost is not None and parsed.command in PRINTING:
        if not isinstance(out.lost, BrokenPipeError):
            print(f"lowres: the output could not be written ({first_line(out.lost)})", file=sys.stderr)
        return LOST  # its output was its purpose
    return code


def explained(work: Callable[[], int | None], command: str = "") -> int:
    """Do the work of a command; returns the exit code. What goes wrong is said in a line; a bug is raised."""
    try:
        return work() or 0
    except UserError as error:
        if not ranks.is_first():
            ranks.let_the_first_speak()
        _complain(str(error))
        return error.exit_code
    except OSError as error:  # of a disk or a permission; the text names the file
        _complain(f"{error}; {disk.remedy(error)}")
        return UserError.exit_code
    except KeyboardInterrupt as error:
        if ranks.is_first():
            own = [f"; {note}" for note in getattr(error, "__notes__", [])]
            _complain(f"interrupted{''.join(own) or REMEDIES.get(command, '')}")
        return 128 + (error.args[0] if isinstance(error, Left) else signal.SIGINT)
    except Exception:  # a bug, or another rank ended during a collective operation
        ranks.let_the_first_speak()
        raise


def _run(parsed: argparse.Namespace) -> int | None:
    module, function = parsed.command.split(":")
    command = getattr(importlib.import_module(f"lowres.cli.{module}"), function)
    if "torch" in sys.modules:
        from lowres.device import prepare_cuda

        prepare_cuda()
    found: int | None = command(parsed)
    return found


def _complain(text: str) -> None:
    print(f"lowres: {text}", file=sys.stderr)
