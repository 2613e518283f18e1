#!/usr/bin/env bash
# torch 2.13.0 (CPU build): torch.load of a file in which one bit has changed since torch.save.
#
# A guess: torch.save writes a zip archive with a CRC-32 for each tensor, so a damaged tensor is an error when it is
# read, as in numpy's .npz, which is a zip archive too. Seen: torch.save computes and writes the CRC-32 (its
# documented default), Python's zipfile finds the damage, and torch.load returns the tensor with the wrong number, with
# weights_only, with mmap and without. So does torch.distributed.checkpoint, whose files hold such archives. One bit of
# an exponent makes a weight or a moment of 0.02 one of 6.8e36. torch is built so for speed (its issue 126952), but the
# documentation of torch.load does not say it. A trainer that wants to know needs a checksum of its own, or
# `zipfile.ZipFile(path).testzip()` before loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
(cd "$folder" && venv/bin/python -W ignore - 2>/dev/null) <<'PY'
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

right = torch.full((1000,), 0.01)
right[500] = 0.02  # the one that is damaged


def damage(path):
    """Flip the highest bit of the exponent of the marked number."""
    data = bytearray(path.read_bytes())
    mark = right.numpy().tobytes()[499 * 4 : 502 * 4]
    assert data.count(mark) == 1
    data[data.index(mark) + 4 + 3] ^= 0x40
    path.write_bytes(data)


def difference(weight):
    index = (weight != right).nonzero().view(-1)
    return [(int(i), right[i].item(), weight[i].item()) for i in index]


print("torch", torch.__version__, "writes a CRC-32:", torch.serialization.get_crc32_options())
assert torch.serialization.get_crc32_options()
torch.save({"weight": right}, "weights.pt")
assert zipfile.ZipFile("weights.pt").testzip() is None
damage(Path("weights.pt"))
bad = zipfile.ZipFile("weights.pt").testzip()
print("zipfile: damaged is", bad)
assert bad is not None
for options in ({}, {"weights_only": False}, {"mmap": True}):
    found = difference(torch.load("weights.pt", **options)["weight"])
    print(f"torch.load {options}: no error; (index, saved, loaded) {found}")
    assert [i for i, _, _ in found] == [500]

dcp.save({"weight": right}, checkpoint_id="distributed")
(file,) = Path("distributed").glob("*.distcp")
damage(file)
state = {"weight": torch.zeros(1000)}
dcp.load(state, checkpoint_id="distributed")
found = difference(state["weight"])
print("torch.distributed.checkpoint: no error;", found)
assert [i for i, _, _ in found] == [500]

np.savez("weights.npz", weight=right.numpy())
damage(Path("weights.npz"))
try:
    np.load("weights.npz")["weight"]
    raise SystemExit("numpy does not look any more")
except zipfile.BadZipFile as error:
    print("numpy.load:", error)
PY
