"""What a run says as it goes: a bar in a terminal; elsewhere, as in a log, a line about every minute."""

from __future__ import annotations

import time

from tqdm import tqdm

from lowres.ranks import say

SECONDS = 60.0  # from one line to the next


class Progress:
    """total: steps of the run; step: those that are done. silent: say nothing."""

    def __init__(self, total: int, step: int, silent: bool) -> None:
        self.total = total
        # tqdm disables itself where there is no terminal
        self._bar = tqdm(total=total, initial=step, unit="step", disable=True if silent else None)
        self._in_lines = self._bar.disable and not silent
        self._said: float | None = None

    def update(self, step: int, text: str) -> None:
        """Say what there is to say after a step."""
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(text)
        if self._in_lines and (self._said is None or time.monotonic() - self._said >= SECONDS):
            self._said = time.monotonic()
            say(f"step {step:,} of {self.total:,}: {text}")

    def go_back(self, step: int) -> None:
        self._bar.n = step
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
