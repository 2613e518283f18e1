"""Does a change keep every result the same? Compares small runs before and after it, bit for bit.

    python scripts/golden.py REV [--runs NAME ...]

Trains each of the small runs below twice: with the code of a commit (in a temporary worktree) and with the
code of the working tree, on this machine and one thread. Compares every loss and every tensor file of the
last checkpoint. Bits depend on the processor and the version of torch, so both sides run on this machine.
Exit codes: 0 equal, 1 something differs. `--keep DIR` keeps the runs of REV, which are then not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = [
    "model.n_layers=3",
    "model.dim=64",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_dim=172",
    "data.source={source}",
    "data.vocab_size=600",
    "data.seq_len=64",
    "data.cache={cache}",
    "train.batch_tokens=448",
    "train.micro_batch=3",
    "train.steps=20",
    "train.eval_every=10",
    "train.eval_tokens=4096",
    "log.progress=false",
]
RELORA = ["relora.enabled=true", "relora.rank=4", "relora.start_step=6", "relora.cycle_steps=5"]
RELORA += ["relora.rewarmup_steps=2", "relora.dropout=0.1", "schedule.warmup_steps=2"]
ON_HOST = [f"memory.{what}_on=host" for what in ("weights", "state", "stash", "carry")]
# the first eight: engines x number formats x ReLoRA
RUNS = {
    "layerwise int8": ["optim.name=apollo-mini", "optim.lr=0.01"],
    "layerwise fp32": [
        "memory.weights=fp32",
        "optim.name=adamw",
        "optim.limiter=1.01",
        "optim.weight_decay=0.1",
    ],
    "autograd int8": ["memory.engine=autograd", "optim.name=adam-mini", "memory.moments=bf16"],
    "autograd fp32": ["memory.engine=autograd", "memory.weights=fp32", "optim.name=apollo"],
    "layerwise int8 relora": [
        *RELORA,
        "optim.name=apollo-mini",
        "relora.reset=magnitude",
        "relora.reset_keep=0.1",
    ],
    "layerwise fp32 relora": [*RELORA, "memory.weights=fp32", "optim.name=adamw", "optim.lr=0.003"],
    "autograd int8 relora": [*RELORA, "memory.engine=autograd", "optim.name=adam-mini"],
    "autograd fp32 relora": [*RELORA, "memory.engine=autograd", "memory.weights=fp32", "optim.name=sgd"],
    # other code paths with different arithmetic
    "bf16, clipped": [
        "memory.weights=bf16",
        "memory.compute=bf16",
        "optim.name=galore",
        "optim.grad_clip=0.5",
    ],
    "on the host, bands": [*ON_HOST, "memory.band=2", "optim.name=fira", "memory.stash_dtype=int8"],
    "master, tied": [
        "memory.master=host",
        "model.tie_embeddings=true",
        "optim.name=adamw8bit",
        "optim.embed_lr=0.002",
    ],
}


def train(code: Path, folder: Path, text: Path, name: str) -> None:
    """Train one run with the code in a folder, unless the run exists."""
    run = folder / name.replace(" ", "-").replace(",", "")
    if (run / "summary.json").exists():
        return
    sets = [s.format(source=text, cache=folder / "data") for s in [*BASE, *RUNS[name]]]
    command = [
        sys.executable,
        "-m",
        "lowres",
        "train",
        str(ROOT / "configs" / "tiny.toml"),
        "--run",
        str(run),
    ]
    command += [part for s in sets for part in ("--set", s)]
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"golden: {name} failed with the code in {code}:\n{done.stderr}")


def results(run: Path) -> dict[str, object]:
    """Losses by step, and the digest of each tensor file of the newest checkpoint."""
    found: dict[str, object] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        for key in ("loss", "grad_norm", "lr", "val_loss", "merge_cosine"):
            if key in record:
                found[f"step {record['step']}: {key}"] = record[key]
    newest = max((run / "checkpoints").iterdir())
    for path in sorted(newest.glob("*.safetensors")):
        found[path.name] = hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare small runs with those of another commit, bit for bit."
    )
    parser.add_argument("rev", metavar="REV", help="commit to compare the working tree with")
    parser.add_argument("--runs", nargs="*", metavar="NAME", default=list(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the text and the runs of REV in this folder"
    )
    parsed = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{parsed.rev}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode:
        sys.exit(f"golden: {parsed.rev} is not a commit of this repository")
    rev = commit.stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (parsed.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tree, text = Path(temporary) / "before", folder / "text"
        if not text.exists():  # the same text for both, even if files of the repository change
            text.mkdir()
            for module in ("argparse", "ast", "calendar", "configparser", "difflib"):
                (text / f"{module}.py").write_text(Path(__import__(module).__file__ or "").read_text("utf-8"))
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, rev], cwd=ROOT, check=True)
        try:
            differing = 0
            for name in parsed.runs:
                sides = []
                for code, place in ((tree, folder / rev), (ROOT, Path(temporary) / "after")):
                    train(code, place, text, name)
                    sides.append(results(place / name.replace(" ", "-").replace(",", "")))
                before, after = sides
                odd = [key for key in before | after if before.get(key) != after.get(key)]
                differing += bool(odd)
                word = (
                    f"differs in {len(odd)} of {len(before)}, first {odd[0]}"
                    if odd
                    else f"equal ({len(before)} values)"
                )
                print(f"{name:<24}{word}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=False)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
