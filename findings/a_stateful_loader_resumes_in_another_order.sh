#!/usr/bin/env bash
# accelerate 1.15.0 with use_stateful_dataloader=True, torchdata 0.11.0, torch 2.13.0: a DataLoader with shuffle=True.
#
# A guess: a torchdata StatefulDataLoader resumes a shuffled epoch exactly, also with another seed; so it does inside
# Accelerator.prepare, whose option is there for that, with save_state and load_state. Seen: torchdata alone does. With
# accelerate the state has the number of batches and no sampler, as accelerate hands over the one of the plain
# DataLoader. The tutorial of torchdata 0.8 says that torch's are patched; they are not, and only its own are saved.
# load_state goes to the right number of batches in a new permutation: the lengths agree, but rows of this epoch are
# seen twice and others never. The RNG states of save_state do not help: they are from after the permutation was drawn.
# With use_seedable_sampler=True and the same seed the first epoch is right; in the second one the order is again
# another, as accelerate does not save its count of epochs. A trainer must name each epoch's permutation by its seed
# and number, and save the number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    accelerate==1.15.0 torchdata==0.11.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import accelerate
import torch
import torchdata
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

ROWS, STOP = list(range(40)), 10  # batches of 2


def flat(batches):
    return [row for batch in batches for row in batch.tolist()]


class Alone:
    """torchdata without accelerate."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.loader = StatefulDataLoader(ROWS, batch_size=2, shuffle=True)

    def save(self, folder):
        torch.save(self.loader.state_dict(), f"{folder}/state.pt")

    def load(self, folder):
        self.loader.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=False))


class Prepared:
    seedable = False

    def __init__(self, seed):
        set_seed(seed)
        configuration = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=self.seedable)
        self.accelerator = Accelerator(cpu=True, dataloader_config=configuration)
        self.loader = self.accelerator.prepare(DataLoader(ROWS, batch_size=2, shuffle=True))

    def save(self, folder):
        self.accelerator.save_state(folder)

    def load(self, folder):
        self.accelerator.load_state(folder)


class Seedable(Prepared):
    seedable = True


class Handed(Alone):
    """torchdata with the sampler of a plain DataLoader, as accelerate makes it."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        plain = DataLoader(ROWS, batch_size=2, shuffle=True)
        self.loader = StatefulDataLoader(ROWS, batch_sampler=plain.batch_sampler)


def trial(name, kind, seeds, epochs=0):
    run = kind(seeds[0])
    for _ in range(epochs):
        flat(run.loader)
    iterator = iter(run.loader)
    seen = flat(next(iterator) for _ in range(STOP))
    with tempfile.TemporaryDirectory() as folder:
        run.save(folder)
        left = flat(iterator)
        resumed = kind(seeds[1])
        resumed.load(folder)
        found = flat(resumed.loader)
    twice, never = len(set(seen) & set(found)), len(set(ROWS) - set(seen) - set(found))
    print(f"{name:<52} {len(found)} of {len(left)} rows, {twice} seen before, {never} never seen")
    assert len(found) == len(left)
    return found == left, twice, never


print("accelerate", accelerate.__version__, "torchdata", torchdata.__version__)
assert trial("torchdata alone, another seed", Alone, (0, 1)) == (True, 0, 0)
right, twice, never = trial("torchdata alone, sampler of a plain DataLoader", Handed, (0, 1))
assert not right and twice == never > 0, "torchdata knows the samplers of torch now"
for seeds in ((0, 0), (0, 1)):
    right, twice, never = trial(f"accelerate, seeds {seeds}", Prepared, seeds)
    assert not right and twice == never > 0, "the order comes back now"
assert trial("accelerate, seedable, seeds (0, 0)", Seedable, (0, 0)) == (True, 0, 0)
right, twice, never = trial("accelerate, seedable, seeds (0, 0), second epoch", Seedable, (0, 0), epochs=1)
assert not right and twice == never > 0, "the epoch comes back now"
PY
"$folder/venv/bin/python" -W ignore "$folder/look.py" 2>/dev/null
