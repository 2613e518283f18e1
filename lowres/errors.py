"""Errors for the user: one line each, which names the key or file and the remedy.

The command line prints the message without a traceback and exits with `exit_code`. Any other exception
is a bug in lowres and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: a config key, a file, a device or data that the user can fix."""

    exit_code = 2


class DoesNotFit(UserError):  # noqa: N818
    """The run needs more GPU memory, host memory or disk than there is."""

    exit_code = 3


class CheckFailed(UserError):  # noqa: N818
    """A check that the user asked for found something wrong (`checkpoint verify`)."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What an error of a library or of the system says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
