"""Weights & Biases: online if there is an account (`wandb login`), otherwise into the folder `wandb` of the
run, from where `wandb sync` sends it. WANDB_MODE and the other variables of the package count.

It gets numbers and the config: no output, no code, no readings of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lowres.trackers.base import Kind, Opening, register

# seconds that the start and the end of a run may wait for the server
START_S, END_S = 60.0, 120.0


class Wandb:
    def __init__(self, opening: Opening) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            init_timeout=START_S,
            finish_timeout=END_S,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
        self._run = wandb.init(
            project=opening.project,
            name=opening.name,
            id=opening.identity,
            dir=str(opening.folder),
            config=opening.config,
            resume="allow",
            reinit="create_new",
            mode=mode,
            settings=settings,
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_account() -> bool:
    """Whether there is a key. Without one, `init` would ask for it, or fail."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # an older version, which always asks
        return bool(wandb.api.api_key)


register(
    Kind(
        "wandb",
        package="wandb",
        about="Weights & Biases; without an account it writes into the run's folder, for `wandb sync`",
        open=Wandb,
        left="wandb",
    )
)
