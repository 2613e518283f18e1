"""Training from a stream while it is still being tokenised.

The folder and the files are the same as in `prepare`; the shards have BLOCK_TOKENS tokens and are called
blocks. A thread writes them, at most one block ahead of training. They are kept, so a resumed run reads the
same blocks again, and after the end of the stream the blocks are a finite data set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lowres.data.folder import Job, is_complete
from lowres.data.prepare import started, write_shards

BLOCK_TOKENS = 1 << 23


class BlockStream:
    """The blocks of a job. Each is written when it, or the block before it, is requested.

    `state`: the content of progress.json at the start, or of data.json if the stream was already tokenised
    completely. Raises UserError like `prepare`.
    """

    def __init__(self, job: Job, folder: Path, progress: bool) -> None:
        self.folder = folder
        self.block_tokens = job.shard_tokens
        self._folder_is_ours = ExitStack()
        self.state: dict[str, Any] = self._folder_is_ours.enter_context(started(job, folder, progress))
        self._changed = threading.Condition()
        self._written = len(self.state["train"])
        self._wanted = 0
        self._ended = is_complete(self.state)
        self._closed = False
        self._error: BaseException | None = None
        writer = write_shards(job, folder, self.state, progress=False)
        # a daemon, because a run that ends must not wait for a block that it does not need
        self._thread = threading.Thread(target=self._write, args=(writer,), daemon=True, name="blocks")
        self._thread.start()

    def has(self, block: int) -> bool:
        """Wait for the block; False if the stream ends before it. Raises the error of the thread, if any."""
        with self._changed:
            self._wanted = max(self._wanted, block)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._written > block or self._ended or self._error or self._closed
            )
            if self._written <= block and self._error:
                raise self._error
            assert self._written > block or self._ended, "the stream was closed before this block"
            return self._written > block

    def length(self) -> int | None:
        """Number of blocks; None until the stream has ended."""
        with self._changed:
            return self._written if self._ended else None

    def close(self) -> None:
        """Stop the thread after the block that it is writing, and wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _write(self, writer: Iterator[int]) -> None:
        written: int | None = 0
        try:
            while written is not None and self._one_more():
                written = next(writer, None)
                with self._changed:
                    self._written = written or self._written
                    self._ended = written is None
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._folder_is_ours.close()

    def _one_more(self) -> bool:
        """Wait until another block is wanted; False if the stream is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._written < self._wanted + 2)
            return not self._closed
