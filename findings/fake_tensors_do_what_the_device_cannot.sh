#!/usr/bin/env bash
# torch 2.13.0 (CPU build): products with `out_dtype` on tensors without memory.
#
# A guess: under FakeTensorMode an operation fails if its device does not have it, so a program that passes there
# runs. Seen: torch.mm, addmm and bmm of bf16 CPU tensors with out_dtype=torch.float32 raise NotImplementedError on
# real tensors, and give fp32 results on fake ones. torch.baddbmm does the opposite of its siblings: on "meta" it
# gives fp32, under FakeTensorMode it raises TypeError, as a decomposition takes out_dtype for beta.
# Who plans memory with fake tensors is glad of the first; who tests with them is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

a, b, wide = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bfloat16), torch.zeros(4, 4)
products = {
    "mm": lambda: torch.mm(a, b, out_dtype=torch.float32),
    "addmm": lambda: torch.addmm(wide, a, b, out_dtype=torch.float32),
    "bmm": lambda: torch.bmm(a[None], b[None], out_dtype=torch.float32),
    "baddbmm": lambda: torch.baddbmm(wide[None], a[None], b[None], out_dtype=torch.float32),
}


def outcome(product):
    try:
        return str(product().dtype)
    except (NotImplementedError, TypeError) as error:
        return type(error).__name__


print("torch", torch.__version__)
for name, product in products.items():
    if torch.cuda.is_available():
        raise SystemExit("this is about a machine without CUDA")
    real = outcome(product)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = outcome(product)
    print(f"{name:<8} real {real:<20} fake {fake}")
    assert real == "NotImplementedError", "the CPU has it now"
    assert fake == ("TypeError" if name == "baddbmm" else "torch.float32"), "fake tensors changed"
PY
