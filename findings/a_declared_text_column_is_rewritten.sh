#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: load_dataset("json") of JSON lines, with Features({"text": Value("string")}).
#
# A guess: a column declared as a string arrives as it stands in the file, or a row that does not fit is refused; a
# text does not depend on the other texts. Seen: the declared type is a cast after pyarrow has guessed a type from all
# rows of a block, so neighbours decide, without an error or a warning.
# - Where all texts of a block look like dates they become timestamps, and the cast makes other text of them:
#   "2019-04-25" is "2019-04-25 00:00:00", and of a time with a zone that of another zone. With one ordinary text more
#   in the file all arrive as they were. Without the declaration they are datetime objects.
# - A number among the texts, and the texts of its block and of all later blocks and files are JSON once more: in
#   quotes, with a line feed as two characters. What was read before is right, so the order of the files decides.
#   Streamed, only the one file is changed: the same files are other text than when they are read at once. Without
#   the declaration it is the same, where the number is not in the first block.
# The documentation of `on_mixed_types` has columns become Json, none that stays a string. on_mixed_types=None refuses
# the number, and lets the dates through. A trainer must read JSON lines with a JSON parser, or compare with one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/look.py" <<'PY'
import datetime
import json
import logging
import warnings

import datasets
from datasets import Features, Value, load_dataset

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
warnings.simplefilter("error")
said = []
listener = logging.Handler()
listener.emit = said.append
logging.getLogger("datasets").addHandler(listener)
declared = Features({"text": Value("string")})
count = 0


def read(*files, features=declared, **options):
    """The texts of the files (each a list of texts), read at once and streamed."""
    global count
    names = []
    for texts in files:
        count += 1
        names.append(f"{count}.jsonl")
        with open(names[-1], "w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    options |= {"data_files": names, "split": "train", "features": features}
    rows = load_dataset("json", **options)
    stream = load_dataset("json", **options, streaming=True)
    return rows["text"][:], [row["text"] for row in stream]


dates = ["2019-04-25", "2019-04-25T10:00:00+02:00"]
alone, streamed = read(dates)
print("dates alone:      ", alone)
assert alone == streamed == ["2019-04-25 00:00:00", "2019-04-25 08:00:00"], "the declared type is what is read now"
beside, streamed = read([*dates, "A text."])
print("beside a text:    ", beside)
assert beside == streamed == [*dates, "A text."]
bare, _ = read(dates, features=None)
print("not declared:     ", repr(bare[0]))
assert bare[0] == datetime.datetime(2019, 4, 25)

before, number, after = ["before"], ["a year", 1984], ["A line.\nAnother."]
again = ['"a year"', "1984"]
for features in (declared, None):
    rows, streamed = read(before, number, after, features=features)
    print("a number:         ", rows, "declared" if features else "not declared")
    print("the same, streamed", streamed)
    assert rows == before + again + ['"A line.\\nAnother."'], "a number no longer changes what comes after it"
    assert streamed == before + again + after
rows, _ = read(before, after, number)
print("in the last file: ", rows)
assert rows == before + after + again
print("warnings:", [record.getMessage() for record in said])
assert not said
assert read(dates, on_mixed_types=None)[0] == alone
try:
    read(number, on_mixed_types=None)
    raise SystemExit("on_mixed_types=None does not refuse a number")
except datasets.exceptions.DatasetGenerationError as error:
    print("with on_mixed_types=None:", error.__cause__)
PY
(cd "$folder" && HF_HOME="$folder/home" venv/bin/python look.py)
