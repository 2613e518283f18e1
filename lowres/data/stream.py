"""Training from a stream while it is still being tokenised.

The folder and the files are the same as in `prepare`; the shards have BLOCK_TOKENS tokens and are called
blocks. A thread writes them, at most one block ahead of what training reads. They are kept, so a resumed run
reads the same blocks again, and after the end of the stream the blocks are a finite data set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lowres.data.folder import Job
from lowres.data.manifest import Complete, Entry, Progress
from lowres.data.prepare import started, write_shards

BLOCK_TOKENS = 1 << 23
# seconds in which a block is written
_PATIENCE = 60.0


class BlockStream:
    """The blocks of a job. Each is written when it, or the block before it, is requested.

    `state`: progress.json at the start, or data.json if the stream was already tokenised completely;
    `entries`: of all blocks so far. Raises UserError like `prepare`.
    """

    def __init__(self, job: Job, folder: Path, progress: bool) -> None:
        self.folder = folder
        self.block_tokens = job.shard_tokens
        self._folder_is_ours = ExitStack()
        self.state: Progress | Complete = self._folder_is_ours.enter_context(started(job, folder, progress))
        self.entries = self.state.train
        self._changed = threading.Condition()
        self._wanted = 0
        self._ended = isinstance(self.state, Complete)
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
                lambda: len(self.entries) > block or self._ended or self._error or self._closed
            )
            if len(self.entries) <= block and self._error:
                raise self._error
            assert len(self.entries) > block or self._ended, "the stream was closed before this block"
            return len(self.entries) > block

    def length(self) -> int | None:
        """Number of blocks; None until the stream has ended."""
        with self._changed:
            return len(self.entries) if self._ended else None

    def close(self) -> None:
        """Stop the thread after the block that it is writing. Waits for it, but not for a lost connection."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    def _write(self, writer: Iterator[list[Entry]]) -> None:
        written: list[Entry] | None = []
        try:
            while written is not None and self._one_more():
                written = next(writer, None)
                with self._changed:
                    self.entries = written or self.entries
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
            self._changed.wait_for(lambda: self._closed or len(self.entries) < self._wanted + 2)
            return not self._closed
