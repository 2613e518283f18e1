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
    Passed,
    Start,
    State,
    Windows,
    load,
    load_state,
    load_unit,
    step_folder,
    step_of,
    verify,
    write,
)
from lowres.checkpoint.kept import Kept, find, free_bytes, newest_state, newest_valid, require_disk
from lowres.checkpoint.saving import Saved, Saver
from lowres.checkpoint.tensors import DTYPES, PIECE_BYTES, NotFinite

__all__ = [
    "DAMAGED",
    "DTYPES",
    "MANIFEST",
    "PIECE_BYTES",
    "PREFIX",
    "Best",
    "Kept",
    "NotFinite",
    "Passed",
    "Saved",
    "Saver",
    "Start",
    "State",
    "Windows",
    "find",
    "free_bytes",
    "load",
    "load_state",
    "load_unit",
    "newest_state",
    "newest_valid",
    "require_disk",
    "step_folder",
    "step_of",
    "verify",
    "write",
]
