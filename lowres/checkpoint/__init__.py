"""Checkpoints of a run.

tensors   safetensors files, read and written in place
folder    one checkpoint: written whole, read without trust
kept      which checkpoint is used, and which ones stay
saving    saving while training goes on
"""

from lowres.checkpoint.folder import (
    DAMAGED,
    MANIFEST,
    PREFIX,
    Best,
    Mixture,
    Passed,
    Start,
    State,
    Windows,
    clear,
    load,
    load_state,
    load_unit,
    passed_before,
    step_folder,
    step_of,
    verify,
    write,
)
from lowres.checkpoint.kept import (
    Kept,
    find,
    free_bytes,
    newest_state,
    newest_valid,
    require_disk,
    require_outside,
)
from lowres.checkpoint.saving import Saved, Saver
from lowres.checkpoint.tensors import (
    DTYPES,
    PIECE_BYTES,
    NotFinite,
    Place,
    host_memory,
    layout,
    pieces_of,
    read_header,
)

__all__ = [
    "DAMAGED",
    "DTYPES",
    "MANIFEST",
    "PIECE_BYTES",
    "PREFIX",
    "Best",
    "Kept",
    "Mixture",
    "NotFinite",
    "Passed",
    "Place",
    "Saved",
    "Saver",
    "Start",
    "State",
    "Windows",
    "clear",
    "find",
    "free_bytes",
    "host_memory",
    "layout",
    "load",
    "load_state",
    "load_unit",
    "newest_state",
    "newest_valid",
    "passed_before",
    "pieces_of",
    "read_header",
    "require_disk",
    "require_outside",
    "step_folder",
    "step_of",
    "verify",
    "write",
]
