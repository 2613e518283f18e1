#!/usr/bin/env bash
# pytorch_optimizer 4.1.0, torch 2.13.0 (CPU build): its RACS (row and column scaled SGD, arXiv 2502.07752).
#
# A guess: as in the paper, the product of a row's and a column's scale is about the square of the gradient there, so
# that gradient / sqrt(row x column) has one size, whatever the size of the gradients is, and rates carry over. Seen:
# each scale is a mean of squares on its own, where the paper's two share the square between them; their product is of
# the fourth power. So the update goes with 1 / gradient: gradients that are 10 times larger move the weights 10 times
# less, and where gradients fade in training, updates grow as far as the limiter lets them.
# And eps = 1e-8 is added to the mean squares. For gradients well below 1e-4, where those of language models are, it is
# all that counts, and the update is proportional to the gradient: plain SGD.
# A rate of this RACS is good for one size of gradients. Compare an implementation with the paper's formula before use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pytorch_optimizer==4.1.0
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from pytorch_optimizer import RACS

ROWS, COLUMNS, STEPS = 64, 32, 500
print("torch", torch.__version__, "pytorch_optimizer", version("pytorch_optimizer"))


def gradients(size):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(ROWS, 1, generator=generator), torch.rand(1, COLUMNS, generator=generator)
    for _ in range(STEPS):
        yield size * torch.randn(ROWS, COLUMNS, generator=generator) * (rows * columns + 0.1)


def rms(x):
    return float(x.square().mean().sqrt())


def library(size):
    """RMS of the last update over the learning rate and alpha."""
    weight = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    optimizer = RACS([weight], lr=2.0, alpha=0.5, gamma=1e9)  # a limiter that never limits
    for weight.grad in gradients(size):
        before = weight.detach().clone()
        optimizer.step()
    return rms(weight.detach() - before)


def paper(size):
    """The same of the paper's: scales of the rank-1 matrix that is closest to the squares, averaged."""
    means = [torch.zeros(ROWS, 1), torch.zeros(1, COLUMNS)]
    for gradient in gradients(size):
        squares = (gradient / size).double() ** 2  # fp32 has no fourth powers of small numbers
        row = torch.ones(ROWS, 1, dtype=torch.float64)
        for _ in range(5):
            column = (row * squares).sum(0, keepdim=True) / row.square().sum()
            row = (column * squares).sum(1, keepdim=True) / column.square().sum()
        means = [0.9 * mean + 0.1 * new for mean, new in zip(means, (row, column), strict=True)]
    return rms(gradient / size / (means[0] * means[1]).sqrt())


seen = {}
for size in (100.0, 10.0, 1.0, 1e-4, 1e-5, 1e-6):
    seen[size] = library(size)
    print(f"gradients of size {size:<7g} update {seen[size]:<10.4g} by the paper {paper(size):.3g}")
for larger, smaller in ((100.0, 10.0), (10.0, 1.0)):
    assert 9 < seen[smaller] / seen[larger] < 11, "the update does not go with 1 / gradient any more"
assert 8 < seen[1e-5] / seen[1e-6] < 12, "eps does not decide any more"
PY
