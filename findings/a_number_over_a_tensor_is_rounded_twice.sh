#!/usr/bin/env bash
# torch 2.13.0 (CPU build): a Python number divided by an fp32 tensor.
#
# A guess: `127 / x` is the quotient rounded once, as IEEE 754 division is, and as `torch.full_like(x, 127) / x`.
# Seen: `127 / x` is 127 times the rounded reciprocal. A quarter of the results differ in the last bit from those of
# the division of two tensors, which are the correctly rounded ones; `1 / x` and `x / 127` agree. Whoever quantises
# with `x * (127 / absmax)` in PyTorch and in a kernel of their own gets other codes for some numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch

print("torch", torch.__version__)
x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 0.5
right = torch.from_numpy((127 / x.double().numpy()).astype(np.float32))  # fp64, rounded once to fp32
seen = {
    "number / tensor": 127 / x,
    "tensor / tensor": torch.full_like(x, 127) / x,
    "number * reciprocal": x.reciprocal() * 127,
}
wrong = {name: int((value != right).sum()) for name, value in seen.items()}
for name, count in wrong.items():
    print(f"{name}: {count} of {len(x)} are not correctly rounded")
exact = torch.equal(1 / x, torch.ones_like(x) / x)
print("1 / tensor agrees with tensor / tensor:", exact)
assert wrong["tensor / tensor"] == 0 and exact
assert torch.equal(seen["number / tensor"], seen["number * reciprocal"])
assert 0.2 < wrong["number / tensor"] / len(x) < 0.3, wrong
PY
