"""Trackio: into its database on this machine, which `trackio show` opens. TRACKIO_DIR says where that is;
with TRACKIO_SPACE_ID or TRACKIO_SERVER_URL it goes to a server."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from lowres.trackers.base import Kind, Opening, register


class Trackio:
    def __init__(self, opening: Opening) -> None:
        with _silence():
            import trackio

            self._finish = trackio.finish  # that of the run would say at exit that it is finished
            self._run: Any = trackio.init(
                project=opening.project,
                name=f"{opening.name}-{opening.identity[:8]}",
                config=opening.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        with _silence():
            self._finish()


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """It says what it does on stdout, which is for a run's results."""
    return contextlib.redirect_stdout(io.StringIO())


register(
    Kind(
        "trackio",
        package="trackio",
        about="Trackio; `trackio show` opens what it keeps on this machine",
        open=Trackio,
    )
)
