"""A model in use, whoever wrote it, without a copy of it on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from lowres.device import prepare_cuda
from lowres.errors import UserError
from lowres.exchange.families import CONFIG_JSON
from lowres.exchange.importing import config_for
from lowres.exchange.stored import initialize_from, open_model
from lowres.ranks import say
from lowres.runs import Trained, as_used, find_run
from lowres.storage import FORMATS


def find_model(path: str | Path, packed: bool = True) -> Trained:
    """The model of a run, a checkpoint or a Hugging Face folder. The weights of a folder stay in the number
    format of its files, fp16 becomes bf16. packed: see `open_run`. Raises UserError."""
    path = Path(path).expanduser()
    if path.is_file():
        raise UserError(f"{path}: is a file; give a run, a checkpoint, or a Hugging Face folder")
    if not os.path.lexists(path / CONFIG_JSON):
        return find_run(path, packed=packed)
    prepare_cuda()
    origin = open_model(path)
    kind = origin.kind if origin.kind in FORMATS else "bf16"
    config, tokenizer = config_for(origin, [f"memory.weights={kind}"])
    for note in origin.notes + tokenizer.notes:
        say(f"note: {note}")
    return Trained(
        as_used(config), tokenizer, False, lambda engine: initialize_from(engine.units(write=True), origin)
    )
