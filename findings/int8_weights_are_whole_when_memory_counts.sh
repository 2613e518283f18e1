#!/usr/bin/env bash
# unsloth 2026.10.9, bitsandbytes 0.50.2, torch 2.13.0: Q-GaLore with weight_quant=True, "model weights are stored in INT8
# during training", for half the memory of weights.
#
# A guess: at the peak of a step (end of the forward pass, or of the backward) weights take about a byte each, and no more
# than one layer is expanded at a time.
# Seen: the model's forward pass expands every matrix first, and each stays so until the optimizer has updated it. At the peak
# weights take their 2 bytes *and* a byte for the codes; only between steps they take one. The first step has no codes yet. So
# the option does not make a model fit that does not fit without it.
#
# The optimizer is loaded from the wheel without the rest of unsloth, which wants a GPU to be imported; its one import from
# unsloth_zoo, a function that waits for the device, is replaced.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps unsloth==2026.10.9
cat > "$folder/look.py" <<'PY'
import importlib
import sys
import types

import torch

for name in ["unsloth", "unsloth_zoo", "unsloth_zoo.device_type"]:
    sys.modules[name] = types.ModuleType(name)
sys.modules["unsloth_zoo.device_type"].device_synchronize = lambda: None
places = [f"{path}/unsloth" for path in sys.path if path.endswith("site-packages")]
sys.modules["unsloth"].__path__ = places
galore = importlib.import_module("unsloth.optimizers.q_galore_adamw")

WIDTH, LAYERS = 256, 8


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        seen.append(taken())
        return x + torch.tanh(self.up_proj(x))


def taken():
    """Bytes per weight: of values, and of codes."""
    values = sum(layer.up_proj.weight.nbytes for layer in model)
    codes = sum(layer.up_proj.weight._q_data.nbytes for layer in model if hasattr(layer.up_proj.weight, "_q_data"))
    return round(values / (LAYERS * WIDTH**2), 2), round(codes / (LAYERS * WIDTH**2), 2)


torch.manual_seed(0)
model, seen = torch.nn.Sequential(*[Layer() for _ in range(LAYERS)]).bfloat16(), []
groups = galore.make_q_galore_param_groups(model, rank=8, proj_quant=False, weight_quant=True)
optimizer = galore.QGaLoreAdamW8bit(groups, lr=1e-3)
optimizer.init_weight_quantization(model, groups)
galore.install_weight_quant_hooks(model)
for step in range(3):
    before, _ = taken(), seen.clear()
    loss = model(torch.randn(4, WIDTH, dtype=torch.bfloat16)).float().square().mean()
    forward = taken()
    loss.backward()
    backward = taken()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step}: bytes per weight, values and codes: before {before}, in the first layer {seen[0]}, "
        f"after the forward pass {forward}, the backward {backward}, the update {taken()}"
    )
assert before == taken() == (0.0, 1.0), "it is not INT8 between steps now"
assert seen[0] == forward == backward == (2.0, 1.0), "matrices are expanded one by one now"
PY
"$folder/venv/bin/python" -W ignore "$folder/look.py" 2>/dev/null
