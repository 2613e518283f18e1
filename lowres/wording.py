"""Words in messages that follow from what they are about."""

import shlex


def command(*words: object) -> str:
    """A command line for the user to repeat, quoted where a shell needs it."""
    return shlex.join(map(str, words))


def counted(number: float, one: str, many: str | None = None) -> str:
    """ "1 row", "2,000 rows". many: default: `one` with an s."""
    return f"{number:,.0f} {one if number == 1 else many or one + 's'}"
