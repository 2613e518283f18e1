"""How far something is: a bar in a terminal; elsewhere, as in a log, a line about every minute."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from lowres import ranks

SECONDS = 60.0  # from one line to the next


class Bar:
    """what: is done. unit: what is counted; "": `what` itself, such as steps. total: how many, if known;
    done: of these already. shown: whether to say anything. leave: whether the full bar stays in the
    terminal."""

    def __init__(
        self,
        what: str,
        unit: str = "",
        total: int | None = None,
        done: int = 0,
        *,
        shown: bool = True,
        leave: bool = False,
    ) -> None:
        self.what, self.unit, self.total, self.n = what, unit, total, done
        self._bar = tqdm(
            desc=what if unit else None,
            unit=f" {unit}" if unit else what,
            unit_scale=bool(unit),
            total=total,
            initial=done,
            leave=leave,
            disable=None if shown else True,  # None: where there is no terminal
        )
        self._in_lines = self._bar.disable and shown and ranks.is_first()
        # steps are slow, so their first one is said; what is over in a minute needs no line
        self._said = time.monotonic() if unit else float("-inf")

    def update(self, more: int = 1, text: str = "") -> None:
        """So many more are done. text: on the last one."""
        self.n += more
        self._bar.update(more)
        if text:
            self._bar.set_postfix_str(text)
        if self._in_lines and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            of = "" if self.total is None else f" of {self._shown(self.total)}"
            ranks.say(f"{self.what} {self._shown(self.n)}{of} {self.unit}".rstrip() + (text and f": {text}"))

    def go_back(self, done: int) -> None:
        self.n = self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()

    def _shown(self, number: int) -> str:
        return tqdm.format_sizeof(number) if self.unit and number >= 1000 else f"{number:,}"

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
