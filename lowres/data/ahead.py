"""Reading ahead, in a thread: the batch of the next step while the device computes the present one, and
documents while others are tokenised.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
B = TypeVar("B")  # a batch


def read_ahead(items: Iterable[T], weight: Callable[[T], int], limit: int) -> Generator[T]:
    """The items, read by a thread that waits while more than `limit` is read and not used. An item is used
    when the next one is asked for. An error comes in its place, and the thread does not keep the process
    alive."""
    changed = threading.Condition()
    ready: deque[tuple[T, int]] = deque()
    held, ended = 0, False
    error: BaseException | None = None

    def may_read() -> bool:
        return held <= limit or ended

    def read() -> None:
        nonlocal held, ended, error
        try:
            for item in items:
                with changed:
                    ready.append((item, weight(item)))
                    held += ready[-1][1]
                    changed.notify_all()
                    del item  # it may be large
                    changed.wait_for(may_read)
                    if ended:
                        return
        except BaseException as caught:  # raised where the item is asked for
            error = caught
        finally:
            with changed:
                ended = True
                changed.notify_all()

    threading.Thread(target=read, name="reading ahead", daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ready or ended)
                if not ready:
                    break
                item, size = ready.popleft()
            yield item
            with changed:
                del item
                held -= size
                changed.notify_all()
        if error is not None:
            raise error
    finally:
        with changed:
            ended = True
            changed.notify_all()


class ReadAhead(Generic[B]):
    """`read(step)` for consecutive steps, one ahead, in a thread. An error is raised at the step whose batch
    cannot be read. The thread does not keep the process alive."""

    def __init__(self, read: Callable[[int], B], end: int) -> None:
        """end: no step from this one on is read."""
        self._read, self._end = read, end
        self._coming: tuple[int, Future[B]] | None = None

    def batch(self, step: int) -> B:
        """The batch of a step; the next one starts to be read."""
        found = self._coming[1] if self._coming and self._coming[0] == step else self._start(step)
        batch = found.result()
        self._coming = (step + 1, self._start(step + 1)) if step + 1 < self._end else None
        return batch

    def _start(self, step: int) -> Future[B]:
        future: Future[B] = Future()

        def work() -> None:
            try:
                future.set_result(self._read(step))
            except BaseException as error:  # raised by `result`
                future.set_exception(error)

        threading.Thread(target=work, name=f"batch of step {step}", daemon=True).start()
        return future
