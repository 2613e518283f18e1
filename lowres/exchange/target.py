"""What is exported appears whole or not at all, on a disk that has room for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowres import disk
from lowres.checkpoint import clear, free_bytes
from lowres.errors import DoesNotFit, UserError
from lowres.lock import held
from lowres.ranks import say

UNFINISHED = ".unfinished"


@contextmanager
def whole(out: Path, nbytes: int) -> Iterator[Path]:
    """A place to write a file or a folder, which becomes `out` at the end of the block. If the block fails,
    nothing is left there.

    nbytes: about how many will be written. Raises UserError if `out` exists (an empty folder is replaced) or
    another process is writing it, DoesNotFit if its disk is too small, DiskError if something cannot be
    written.
    """
    _require_free(out)
    free = free_bytes(out.parent)
    if free < nbytes:
        raise DoesNotFit(
            f"{out}: the disk has {free / 2**30:.2f} GiB free, but {nbytes / 2**30:.2f} GiB are needed; make "
            "room, or give another place"
        )
    temporary = out.with_name(out.name + UNFINISHED)
    with held(out.parent, f"{out.name} is being written", f"{out.name}.lock") as lock:
        if lock.note is not None:
            say(f"note: {lock.note}")
        _require_free(out)  # another process may just have finished it
        clear(temporary)
        try:
            with disk.named(out, "written"):
                yield temporary
                if out.exists():
                    out.rmdir()
                os.rename(temporary, out)
                disk.sync_folder(out.parent)
        finally:
            clear(temporary)


def _require_free(out: Path) -> None:
    there = out.is_symlink() or out.exists()
    # "." has no name: another folder cannot take its place
    if there and not (out.name and out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; move it away, or give another place")
