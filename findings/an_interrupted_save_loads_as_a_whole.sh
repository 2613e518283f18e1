#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: Dataset.save_to_disk over an earlier save, stopped by Ctrl-C; then load_from_disk.
#
# A guess: the folder of a save that was not finished does not load, or loads as it was before. In a new folder that is
# so, as state.json, which names the shards, is written last. Seen: over an earlier save with as many shards, the old
# state.json stays while the shards are written in place under their old names, and an interrupted one is closed as a
# file of fewer rows. The folder loads without a word, as the first rows of the new data, a hole, and the last rows of
# the old. Neither file has the number of rows, and Arrow's streams (unlike its files, and parquet) have no footer with
# it: a process killed between two batches leaves such a shard, too.
# And a save of fewer shards leaves the old ones there: load_from_disk does not read them, but a glob does, and the
# rows of both come mixed, in the order of the names.
# The documentation of save_to_disk says nothing of an earlier save. A trainer must save to a new folder and rename it,
# and read the shards that state.json names, not those that are there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/save.py" <<'PY'
import signal
import sys

import datasets

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
name, rows, shards, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
datasets.disable_progress_bars()
datasets.Dataset.from_dict({"text": [name] * rows}).save_to_disk(folder, num_shards=shards)
PY
cat > "$folder/look.py" <<'PY'
import itertools
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
warnings.simplefilter("error")


def save(*arguments):
    return subprocess.Popen([sys.executable, "save.py", *map(str, arguments)], stderr=subprocess.DEVNULL)


def interrupt(folder, old_size):
    """Save "new" there, with Ctrl-C when the second of three shards has been begun."""
    shard, process = Path(folder, "data-00001-of-00003.arrow"), save("new", 6_000_000, 3, folder)
    while process.poll() is None:
        size = shard.stat().st_size if shard.exists() else 0
        if size > 100_000 and size != old_size:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.001)
    assert process.wait() != 0, "it was not interrupted"


def texts(rows):
    return {name: len(list(found)) for name, found in itertools.groupby(rows["text"][:])}


interrupt("empty", None)
try:
    datasets.load_from_disk("empty")
    raise SystemExit("an unfinished folder loads now")
except FileNotFoundError as error:
    print("a new folder:", type(error).__name__)

assert save("old", 300_000, 3, "kept").wait() == 0
interrupt("kept", Path("kept/data-00001-of-00003.arrow").stat().st_size)
found = texts(datasets.load_from_disk("kept"))
print("3 shards of 2,000,000 new rows over 3 of 100,000 old ones, interrupted in the second; it loads:", found)
assert list(found) == ["new", "old"] and found["old"] == 100_000, "it no longer saves in place"
assert 2_000_000 < found["new"] < 4_000_000

assert save("old", 9, 3, "fewer").wait() == 0
assert save("new", 4, 2, "fewer").wait() == 0
found = texts(datasets.load_from_disk("fewer"))
glob = datasets.load_dataset("arrow", data_files="fewer/*.arrow", split="train")["text"][:]
print("2 shards of 2 new rows over 3 of 3 old ones; it loads:", found, "and a glob:", " ".join(glob))
assert found == {"new": 4}
assert glob == ["new"] * 2 + ["old"] * 3 + ["new"] * 2 + ["old"] * 6, "old shards are removed now"
PY
(cd "$folder" && HF_HOME="$folder/home" venv/bin/python look.py)
