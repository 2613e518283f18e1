"""How fast text becomes ids: `Tokenizer.encode_batch` beside the batch encoders of its own libraries, and one
long line beside ordinary documents. Writes benchmarks/results/encoding.json.

    python scripts/bench_encoding.py books.jsonl.xz [--megabytes 8] [--line 300] [--rounds 7]

Both tokenizers are trained on the text: a SentencePiece model of 32,000 pieces, and a byte-level BPE in the
way of GPT-2. The arms take turns; the library's gives its ids, as arrays where it can. A rate is MB of UTF-8
a second of wall-clock time, the median over the rounds. A ratio is the median of the rounds' ratios of
processor times, which other programs on the machine disturb less. The long line is encoded in a process of
its own, whose memory above the text is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from records import cpu, provenance, write
from tokenizers import decoders, models, pre_tokenizers, trainers

from lowres.data.tokenizer import Tokenizer, open_tokenizer, train
from lowres.data.tokenizer.base import threads
from lowres.text import documents

OUT = Path(__file__).parent.parent / "benchmarks/results/encoding.json"
KINDS = ("sentencepiece", "tokenizers")
VOCAB = 32_000
SAMPLE = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="text: a path as data.source")
    parser.add_argument("--megabytes", type=int, default=8, help="text for the rates")
    parser.add_argument("--line", type=int, default=300, help="megabytes of the long line")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--long-line-of", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    texts = read(parsed.source, parsed.megabytes * 1_000_000)
    if parsed.long_line_of:
        print(json.dumps(long_line(open_tokenizer(parsed.long_line_of, form="own"), texts, parsed.line)))
        return
    record: dict[str, Any] = provenance(torch.device("cpu")) | {"cpu": cpu(), "encoding_threads": threads()}
    record["versions"] |= {"sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__}
    record["megabytes"] = size_of(texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in made(texts, Path(folder)).items():
            record[kind] = rates(kind, path, texts, parsed.rounds)
            print(kind, json.dumps(record[kind]), flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--long-line-of", str(path)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            record[kind]["long_line"] = json.loads(found)
            print("  long line", found, flush=True)
    write(parsed.out, record)


def read(source: str, nbytes: int) -> list[str]:
    """The first documents of a source, until they have that many bytes."""
    found, size = [], 0
    for text in documents(source):
        if size >= nbytes:
            break
        found.append(text)
        size += len(text.encode())
    return found


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def made(texts: list[str], folder: Path) -> dict[str, Path]:
    """A tokenizer of each kind, trained on a part of the texts."""
    every = max(1, sum(map(len, texts)) // SAMPLE)
    sample = list(islice(texts, 0, None, every))
    own = folder / "tokenizer.model"
    own.write_bytes(train(sample, VOCAB, exact=False)[0])
    other = tokenizers.Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(sample, trainer)
    other.save(str(folder / "tokenizer.json"))
    return dict(zip(KINDS, (own, folder / "tokenizer.json"), strict=True))


def rates(kind: str, path: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """MB/s of the library and of lowres, in turns."""
    ours = open_tokenizer(path, form="own")
    arms: dict[str, Callable[[], Any]] = {}
    if kind == "sentencepiece":
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        arms["library"] = lambda: theirs.encode(texts, num_threads=threads(), return_type="numpy")
    else:
        library = tokenizers.Tokenizer.from_file(str(path))
        library.encode_special_tokens = True
        arms["library"] = lambda: [
            one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)
        ]
    arms["lowres"] = lambda: ours.encode_batch(texts)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            seconds[name].append(timed(run))
    size = size_of(texts) / 1e6
    ratios = [a / b for (_, a), (_, b) in zip(seconds["library"], seconds["lowres"], strict=True)]
    return {
        "megabytes_per_s": {
            name: size / statistics.median(wall for wall, _ in pairs) for name, pairs in seconds.items()
        },
        "processor_seconds": {name: [seconds for _, seconds in pairs] for name, pairs in seconds.items()},
        "rate_over_library": statistics.median(ratios),
        "tokens": sum(map(len, ours.encode_batch(texts))),
    }


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall-clock and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    passed = time.perf_counter() - wall, time.process_time() - processor
    del found
    return passed


def long_line(tokenizer: Tokenizer, texts: list[str], megabytes: int) -> dict[str, float]:
    """One line made of the texts: its rate, that of the texts, and GiB of memory above the text."""
    runs = [timed(lambda: tokenizer.encode_batch(texts))[1] for _ in range(3)]
    ordinary = size_of(texts) / statistics.median(runs)
    one = " ".join(" ".join(text.split()) for text in texts)
    line = " ".join([one] * -(-megabytes * 1_000_000 // len(one.encode())))
    size = len(line.encode())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    _, seconds = timed(lambda: tokenizer.encode_batch([line]))
    return {
        "megabytes": size / 1e6,
        "rate_over_documents": size / seconds / ordinary,
        "memory_gib": sys.getsizeof(line) / 2**30,
        "peak_above_text_gib": (resident("VmHWM") - before) / 2**30,
    }


def resident(key: str) -> int:
    """Bytes of memory that the process has now (VmRSS), or has had at most (VmHWM)."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


if __name__ == "__main__":
    main()
