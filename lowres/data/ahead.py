"""Reads the batch of the next step while the device computes the present one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor


class ReadAhead:
    """`read(step)` for consecutive steps, one ahead, in a thread. An error is raised at the step whose batch
    cannot be read. The thread does not keep the process alive."""

    def __init__(self, read: Callable[[int], Tensor], end: int) -> None:
        """end: no step from this one on is read."""
        self._read, self._end = read, end
        self._coming: tuple[int, Future[Tensor]] | None = None

    def batch(self, step: int) -> Tensor:
        """The batch of a step; the next one starts to be read."""
        found = self._coming[1] if self._coming and self._coming[0] == step else self._start(step)
        batch = found.result()
        self._coming = (step + 1, self._start(step + 1)) if step + 1 < self._end else None
        return batch

    def _start(self, step: int) -> Future[Tensor]:
        future: Future[Tensor] = Future()

        def work() -> None:
            try:
                future.set_result(self._read(step))
            except BaseException as error:  # raised by `result`
                future.set_exception(error)

        threading.Thread(target=work, name=f"batch of step {step}", daemon=True).start()
        return future
