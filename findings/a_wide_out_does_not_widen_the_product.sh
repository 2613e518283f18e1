#!/usr/bin/env bash
# torch 2.13.0 (CPU build): torch.mul(int8 codes, bf16 scales, out=fp32).
#
# A guess: with an fp32 `out` the product of an 8-bit integer and a bf16 number is computed in fp32, where it is exact
# (7 + 8 bits fit in 24). Seen: the operands alone decide; the product is rounded to bf16, and the fp32 result holds
# bf16 numbers. More than half of the products of codes in [-127, 127] lose bits. With one operand converted to fp32
# before, all are exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
generator = torch.Generator().manual_seed(0)
codes = torch.randint(-127, 128, (1000, 32), dtype=torch.int8, generator=generator)
scales = torch.rand(1000, 1, generator=generator).bfloat16()
out = torch.empty(1000, 32)
torch.mul(codes, scales, out=out)
exact = codes.double() * scales.double()
print("with out=fp32:", f"{float((out != exact).double().mean()):.2f} of the products are not exact")
print("result is made of bf16 numbers:", torch.equal(out, out.bfloat16().float()))
torch.mul(codes, scales.float(), out=out)
print("scales converted first:", f"{float((out != exact).double().mean()):.2f}")
assert torch.equal(out.double(), exact)
torch.mul(codes, scales, out=out)
assert torch.equal(out, out.bfloat16().float())
assert float((out != exact).double().mean()) > 0.5
PY
