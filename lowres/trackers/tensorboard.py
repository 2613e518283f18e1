"""TensorBoard: event files in the folder `tensorboard` of the run, written by torch.utils.tensorboard.

A file that begins anew at a step says so, and TensorBoard drops what earlier files have from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowres.trackers.base import Kind, Opening, register

FOLDER = "tensorboard"
FLUSH_S = 10


class TensorBoard:
    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = opening.step + 1 if opening.again else None
        self._writer: Any = SummaryWriter(str(opening.folder / FOLDER), purge_step=purge, flush_secs=FLUSH_S)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


register(
    Kind(
        "tensorboard",
        package="tensorboard",
        about=f"TensorBoard; `tensorboard --logdir RUN/{FOLDER}` shows it",
        open=TensorBoard,
        left=FOLDER,
        replaces=True,
    )
)
