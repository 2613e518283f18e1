#!/usr/bin/env bash
# triton 3.9.0, TRITON_INTERPRET=1, torch 2.13.0 (CPU build): `x.to(tl.bfloat16)` of fp32 numbers.
#
# A guess: the interpreter converts as a GPU does (`cvt.rn.bf16.f32`): to nearest, ties to even, like torch. Seen: it
# cuts the lower half off. 0.99999994 becomes 0.99609375 instead of 1, 255.9 becomes 255 instead of 256; of random
# numbers half are one unit too small in magnitude, so sums of converted numbers drift towards zero. A kernel that
# passes against torch on a GPU fails under the interpreter, and a test with a tolerance of a bf16 unit sees nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
x[:2] = torch.tensor([0.99999994, 255.9])
out = torch.zeros(4096, dtype=torch.bfloat16)
convert[(1,)](x, out, 4096)
cut = (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
wrong = float((out != x.bfloat16()).double().mean())
print("triton", triton.__version__, "torch", torch.__version__)
print("interpreted:", out[:2].tolist(), "torch:", x[:2].bfloat16().tolist())
print(f"not the nearest: {wrong:.2f} of the numbers; all are cut off: {torch.equal(out, cut)}")
assert torch.equal(out, cut) and 0.45 < wrong < 0.55
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py"
