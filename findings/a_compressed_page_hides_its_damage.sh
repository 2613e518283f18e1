#!/usr/bin/env bash
# pyarrow 26.0.1, zstandard 0.25.0: text in parquet and in .zst, in which one bit has changed since it was written.
#
# A guess: compressed data has a checksum, as gzip and the zstd program write one, so a flipped bit is an error; and
# parquet has room for a CRC in each page besides. Seen: the codec decides. Of 200 flipped bits of a page gzip finds
# each; with snappy (the default), lz4 and zstd more than half come out as other text, with the right number of rows
# and no error, as Arrow writes zstd frames without their checksum, and pages without a CRC. Python's zstandard writes
# .zst data without a checksum as well.
# Files that do have CRCs (write_page_checksum=True) are read the same way, as a reader has to ask for them too; one
# that asks (page_checksum_verification=True) says nothing of a file without. Only both together find each bit.
# These defaults are in the documentation of each; that the codec decides what damage is seen is not.
# A trainer must ask for verification, and keep a checksum of its own for files without CRCs, as most are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 zstandard==0.25.0
"$folder/venv/bin/python" - <<'PY'
import io
import random

import pyarrow
import pyarrow.parquet
import zstandard

print("pyarrow", pyarrow.__version__, "zstandard", zstandard.__version__)
rng = random.Random(0)
words = ["".join(rng.choices("etaoinshrdlu", k=6)) for _ in range(500)]
right = [" ".join(rng.choices(words, k=40)) for _ in range(200)]


def outcomes(data, begin, end, read):
    """What is read where one of 200 bits between two places is flipped."""
    found = {"right": 0, "other text": 0, "error": 0}
    for i in range(200):
        damaged = bytearray(data)
        damaged[begin + (end - begin) * i // 200] ^= 1 << i % 8
        try:
            texts = read(bytes(damaged))
        except (OSError, ValueError, zstandard.ZstdError):  # pyarrow's errors are among these
            found["error"] += 1
            continue
        found["right" if texts == right else "other text"] += 1
    return found


def parquet(codec, crc, verify):
    out = io.BytesIO()
    table = pyarrow.table({"text": right})
    # one page of plain text behind a short header, so that the places below are in it
    options = {"compression": codec, "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, out, write_page_checksum=crc, **options)
    column = pyarrow.parquet.read_metadata(io.BytesIO(out.getvalue())).row_group(0).column(0)
    begin, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size

    def read(data):
        column = pyarrow.parquet.read_table(io.BytesIO(data), page_checksum_verification=verify)["text"]
        assert len(column) == len(right)
        return column.to_pylist()

    assert read(out.getvalue()) == right
    found = outcomes(out.getvalue(), begin + 200, end, read)
    print(f"parquet, {codec:<6} page CRCs {str(crc):<5} verified {str(verify):<5}: {found}")
    return found


for codec in ("snappy", "lz4", "zstd"):
    for crc, verify in ((False, False), (True, False), (False, True)):
        assert parquet(codec, crc, verify)["other text"] > 100, "damage is found now"
    assert parquet(codec, True, True)["error"] == 200
assert parquet("gzip", False, False)["error"] == 200

for options in ({}, {"write_checksum": True}):
    data = zstandard.ZstdCompressor(**options).compress("\n".join(right).encode())
    found = outcomes(data, 200, len(data), lambda d: zstandard.decompress(d).decode(errors="replace").split("\n"))
    print(f"zstandard {options}: {found}")
    assert found["error"] == 200 if options else found["other text"] > 50, "damage is found now"
PY
