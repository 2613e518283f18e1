#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0 (CPU build): the optimizer Muon at ZeRO stages 0 to 3, without gradient_clipping in
# the config.
#
# A guess: a stage decides where state, gradients and weights are, not what a step is. And clipping by the norm of the
# gradient comes before an optimizer, where Muon, whose updates have one size whatever the gradients are, does not feel
# it. Seen: gradient_clipping is 1.0 where the config does not have it, and at stages 1 to 3 the updates are already
# orthogonalised where the norm is taken, so it is the finished updates that are clipped. All matrices together then
# move by lr a step, each by lr / sqrt(their number), where one of width n moves by about 0.65 x lr x sqrt(n) at stage 0.
# With 8 matrices of 64 x 64 a step is 15 times shorter at stage 1 than at stage 0; with 7 x 32 matrices of
# 4096 x 4096 it would be some 600 times. With "gradient_clipping": 0 all stages agree.
# (That 1.0 is the default is documented; what it clips is not.)
# A learning rate found at one stage, or at one depth, is none for another: always set gradient_clipping to 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8
cat > "$folder/look.py" <<'PY'
import os

import torch

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

WIDTH, DEPTH, LR = 64, 8, 0.02


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(32, WIDTH)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.lm_head = torch.nn.Linear(WIDTH, 32, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return torch.nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), tokens.flatten())


def lengths(stage, clipping):
    """The norm of each matrix's change in one step, in units of the learning rate."""
    model = Model()
    before = [layer.weight.detach().clone() for layer in model.layers]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Muon", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_scatter": False},
    } | clipping
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine(torch.arange(32).view(2, 16)))
    engine.step()
    after = [safe_get_full_fp32_param(p.weight) if stage else p.weight.detach() for p in model.layers]
    return [float((new - old).norm()) / LR for new, old in zip(after, before, strict=True)]


deepspeed.init_distributed("gloo", verbose=False)
print("torch", torch.__version__, "deepspeed", deepspeed.__version__)
seen = {}
for clipping in ({}, {"gradient_clipping": 0.0}):
    for stage in range(4):
        found = seen[bool(clipping), stage] = torch.tensor(lengths(stage, clipping))
        print(f"stage {stage}, {clipping or 'no gradient_clipping'}: a matrix moves by {found.mean():.3f} x lr, all "
              f"together by {found.norm():.3f} x lr")
whole = seen[True, 0]
for stage in range(4):
    assert torch.allclose(seen[True, stage], whole, rtol=0.02), "stages differ without clipping"
assert torch.allclose(seen[False, 0], whole, rtol=0.02), "stage 0 clips updates too"
for stage in (1, 2, 3):
    assert float(seen[False, stage].norm()) < 1.01 and float(whole.mean() / seen[False, stage].mean()) > 10, "mended"
PY
DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1 TORCH_EXTENSIONS_DIR="$folder/built" \
    "$folder/venv/bin/python" "$folder/look.py" 2>"$folder/log" | grep -E "^(torch|stage)" ||
    { tail -5 "$folder/log"; exit 1; }
