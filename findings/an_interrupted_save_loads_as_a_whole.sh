#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: Dataset.save_to_disk over an earlier save, stopped by Ctrl-C; then load_from_disk.
#
# A guess: the folder of a save that was not finished does not load, or loads as it was before. In a new folder it is
# so, as state.json, which names the shards, is written last. Seen: over an earlier save with as many shards, the old
# state.json stays while the shards are written in place under their old names, and an interrupted one is closed as a
# stream of fewer rows. The folder loads without a word: the first rows of the new data, a hole, and the last rows of
# the old; there is only an error where the interrupt fell into the writing of a batch. No file has the number of rows:
# an Arrow stream, other than an Arrow or parquet file, has no footer, and is whole where a batch ends.
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
import os
import signal
import sys
import threading
import time

import datasets

name, rows, shards, folder, watched = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
data = datasets.Dataset.from_dict({"text": [name] * rows})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C


def size():
    return os.stat(watched).st_size if os.path.exists(watched) else 0


def interrupt(old_size):
    """Ctrl-C when the watched shard has been begun anew."""
    while size() < 100_000 or size() == old_size:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)


if watched != "-":
    threading.Thread(target=interrupt, args=(size(),), daemon=True).start()
datasets.disable_progress_bars()
data.save_to_disk(folder, num_shards=shards)
PY
cat > "$folder/look.py" <<'PY'
import itertools
import subprocess
import sys
import warnings

import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
warnings.simplefilter("error")


def save(name, rows, shards, folder, interrupted_in="-"):
    command = [sys.executable, "save.py", name, rows, shards, folder, interrupted_in]
    ended = subprocess.run([str(word) for word in command], stderr=subprocess.DEVNULL).returncode
    assert ended == 0 or interrupted_in != "-"


def load(folder):
    try:
        rows = datasets.load_from_disk(folder)["text"][:]
    except (OSError, ValueError) as error:  # no state.json, or a batch that is cut
        return f"{type(error).__name__}: {str(error)[:60]}"
    return {name: len(list(found)) for name, found in itertools.groupby(rows)}


save("new", 6_000_000, 3, "empty", "empty/data-00001-of-00003.arrow")
print("a new folder:", load("empty"))
assert load("empty").startswith("FileNotFoundError"), "an unfinished folder loads now"

print("3 shards of 2,000,000 new rows over 3 of 100,000 old ones, interrupted in the second:")
for _ in range(10):  # an interrupt may fall between two batches or into one
    save("old", 300_000, 3, "kept")
    save("new", 6_000_000, 3, "kept", "kept/data-00001-of-00003.arrow")
    found = load("kept")
    print(" ", found)
    if isinstance(found, dict) and found.get("old") == 100_000:
        break
assert list(found) == ["new", "old"] and found["old"] == 100_000, "it no longer saves in place"
assert 2_000_000 < found["new"] < 4_000_000

save("old", 9, 3, "fewer")
save("new", 4, 2, "fewer")
found = load("fewer")
glob = datasets.load_dataset("arrow", data_files="fewer/*.arrow", split="train")["text"][:]
print("2 shards of 2 new rows over 3 of 3 old ones; it loads:", found, "and a glob:", " ".join(glob))
assert found == {"new": 4}
assert glob == ["new"] * 2 + ["old"] * 3 + ["new"] * 2 + ["old"] * 6, "old shards are removed now"
PY
(cd "$folder" && HF_HOME="$folder/home" venv/bin/python look.py)
