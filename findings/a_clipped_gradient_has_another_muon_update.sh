#!/usr/bin/env bash
# torch 2.13.0 (CPU build): torch.optim.Muon on a gradient of low rank, as of a layer that sees few tokens.
#
# A guess: Muon's update does not depend on the size of the gradient, so gradient clipping does nothing to a first
# step; a gradient of rank 16 has an update of rank 16; and fp64 parameters have it to fp64. The Newton-Schulz
# iteration is said to be stable in bf16, so at worst all this holds to the precision of bf16, half a percent.
# Seen: the iteration runs in bf16 whatever the parameters are, and the first thing that happens to the gradient is to
# be rounded to it. Rounding makes it full rank, and the iteration lifts what is small: five steps make of a singular
# value of 1/1000 one of 0.4. So the smaller the rank, the more of the update is lifted rounding error. With 512 x 512:
#   rank 512: the update of 1/3 of the gradient differs by 2 % from that of the gradient
#   rank  64: by 23 %;   4 % of the update's energy is outside of the space that the gradient's rows and columns span
#   rank  16: by 55 %;  15 %
#   rank   1: by 118 %; 73 %
# A factor that is a power of 2, as a loss scale is, changes no bit. In fp64 the same iteration differs by 1e-12 at most.
# Against fp64, the update of rank 16 is off by 43 %; with the gradient normalised first and the iteration in fp16, which
# has as many bytes, by 6 %.
# The documentation of Muon has no word on bf16. A test of Muon against another device, another order of summation or an
# fp32 implementation has to use gradients of full rank, or compare what updates do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
WIDTH = 512


def updated(gradient):
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    return -weight.detach()


def iterated(gradient, dtype=torch.float64, a=3.4445, b=-4.7750, c=2.0315):
    """The documented iteration in a number format, after normalising in that of the gradient."""
    x = (gradient / gradient.norm()).to(dtype)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.double()


def difference(one, other):
    return float((one - other).norm() / one.norm())


assert "bf16" not in torch.optim.Muon.__doc__ and "bfloat16" not in torch.optim.Muon.__doc__, "documented now"
seen = {}
for rank in (512, 64, 16, 1):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64)
    gradient = torch.randn(WIDTH, rank, generator=generator, dtype=torch.float64) @ tokens
    rows, _, columns = torch.linalg.svd(gradient)
    rows, columns = rows[:, :rank], columns[:rank]
    update = updated(gradient)
    assert update.dtype == torch.float64
    inside = rows.T @ update @ columns.T
    outside = max(0.0, 1 - float((inside.norm() / update.norm()) ** 2))
    third, fourfold = difference(update, updated(gradient / 3)), difference(update, updated(gradient * 4))
    wide = difference(iterated(gradient), iterated(gradient / 3))
    exact = iterated(gradient)
    off, off_half = difference(exact, update), difference(exact, iterated(gradient, torch.float16))
    seen[rank] = third, outside, off, off_half
    print(f"rank {rank:>3}: a third of the gradient: update differs by {third:.1%} (in fp64 {wide:.0e}), four times "
          f"the gradient: {fourfold:.0%}; outside of the gradient's space: {outside:.1%} of its energy; off from fp64 by "
          f"{off:.1%}, an iteration in fp16 by {off_half:.1%}")
    assert fourfold == 0 and wide < 1e-6
assert seen[512][0] < 0.05, "full rank is bad too"
assert seen[64][0] > 0.15 and seen[16][0] > 0.4 and seen[1][0] > 0.8, "more precise now"
assert seen[64][1] > 0.02 and seen[16][1] > 0.1 and seen[1][1] > 0.5, "more precise now"
assert all(off > 3 * half for _, _, off, half in seen.values()), "fp16 is no better"
PY
