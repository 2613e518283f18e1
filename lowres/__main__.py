"""`python -m lowres` is the same as the installed `lowres` command."""

import signal
import sys

from lowres.cli import main


def run() -> int:
    """The command line as a program of its own; returns the exit code."""
    code = main()
    # a late Ctrl-C, while Python ends, would print a traceback after the last line
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(run())
