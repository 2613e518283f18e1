"""`python -m lowres` is the same as the installed `lowres` command."""

import signal
import sys


def run() -> int:
    """The command line as a program of its own; returns the exit code."""
    try:
        from lowres.cli import main  # takes a second
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    code = main()
    # a late Ctrl-C, while Python ends, would print a traceback after the last line
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(run())
