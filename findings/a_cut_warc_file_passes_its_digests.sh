#!/usr/bin/env bash
# warcio 1.8.1: a WET file (one gzip member per record, as Common Crawl has them) whose download stopped in the middle.
#
# A guess: ArchiveIterator fails at the cut, as gzip does, or at the record that is shorter than its Content-Length; at
# the latest with check_digests="raise", as the record carries a SHA-1 of its text. Seen: the last record is read as a
# shorter text, and then the file ends in the ordinary way. Its digest is not compared: `passed` is None, not False,
# with an empty list of problems, as a digest is judged when all of the length has been read. The command
# `warcio check` is silent and exits with 0. Where the cut is in the first bytes of a record, that record is not there.
# A flipped bit of the text is found by the same options, so a test with one shows nothing of this.
# (Issue 138 of warcio has it for the command, since 2021. What `passed` is where the text is short is nowhere said.)
# A trainer must compare each record's length with its Content-Length, and the end of the file with that of a member.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check warcio==1.8.1
cat > "$folder/look.py" <<'PY'
import gzip
import io
import random
import subprocess
from importlib.metadata import version
from pathlib import Path

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.warcwriter import WARCWriter

print("warcio", version("warcio"))
rng, file = random.Random(0), io.BytesIO()
writer, ends, lengths = WARCWriter(file, gzip=True), [], []
for i in range(3):
    text = " ".join(str(rng.random()) for _ in range(3000)).encode()
    options = {"payload": io.BytesIO(text), "warc_content_type": "text/plain", "length": len(text)}
    writer.write_record(writer.create_warc_record(f"https://example.org/{i}", "conversion", **options))
    lengths.append(len(text))
    ends.append(file.tell())
whole = file.getvalue()


def read(data):
    """The length, the promised length, and the verdict on the digest of each record."""
    found = []
    for record in ArchiveIterator(io.BytesIO(data), check_digests="raise"):
        length = len(record.content_stream().read())
        checker = record.digest_checker
        assert not checker.problems
        found.append((length, record.length, checker.passed))
    Path("cut.warc.wet.gz").write_bytes(data)
    check = subprocess.run(["venv/bin/warcio", "check", "cut.warc.wet.gz"], capture_output=True, text=True)
    print(f"  records {found}; warcio check exits with {check.returncode}, and says {check.stdout + check.stderr!r}")
    assert (check.returncode, check.stdout + check.stderr) == (0, "")
    return found


print("whole:")
right = read(whole)
assert right == [(length, length, True) for length in lengths]
for name, cut in (("in the text of the third", (ends[1] + ends[2]) // 2), ("in its first bytes", ends[1] + 20)):
    print(f"cut {name}:")
    found = read(whole[:cut])
    try:
        gzip.decompress(whole[:cut])
        raise SystemExit("gzip does not look any more")
    except EOFError as error:
        print("  gzip:", error)
    assert found[:2] == right[:2]
    if len(found) == 3:
        assert found[2][0] < found[2][1] == lengths[2] and found[2][2] is None, "a short record is judged now"
assert len(found) == 2

text = gzip.decompress(whole)
plain = bytearray(text)
plain[-100] ^= 1
try:
    read(bytes(plain))
    raise SystemExit("digests are not compared any more")
except ArchiveLoadFailed as error:
    print("one bit of the text flipped:", type(error).__name__, error)
PY
(cd "$folder" && venv/bin/python look.py)
