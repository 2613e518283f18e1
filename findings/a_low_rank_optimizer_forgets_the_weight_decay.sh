#!/usr/bin/env bash
# transformers 5.24.0, galore-torch 1.0, apollo-torch 1.0.3, torch 2.13.0 (CPU build): Trainer with optim="galore_adamw"
# or "apollo_adamw", beside optim="adamw_torch".
#
# A guess: another `optim` is another rule for the same settings: weight_decay, adam_beta1, adam_beta2 and adam_epsilon
# of TrainingArguments are those of the run, as for adamw_torch; and optim_target_modules="all-linear" is all linear
# layers but the head, as it is in peft's target_modules. Seen:
# - weight_decay is dropped by both: these two make parameter groups of their own, and the groups that have the decay
#   in them are replaced. A run with 0.1 is bit for bit the run with 0.
# - GaLore does not read the betas and epsilon at all; it takes its own (0.9, 0.999) and 1e-6. APOLLO reads them for the
#   matrices, while embedding and norms take its own. So one model has two AdamWs.
# - "all-linear" has the head in it: APOLLO scales, and GaLore projects, the matrix of the vocabulary to `rank`.
# None of this is logged or documented. Who compares these optimizers with AdamW in this Trainer, at "equal settings",
# compares a decayed run with one that is not, at another beta2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
    accelerate==1.15.0 bitsandbytes==0.50.2 galore-torch==1.0 apollo-torch==1.0.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

tokens = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
examples = [{"input_ids": row, "labels": row} for row in tokens]
plain = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-6}


def trained(optim, **changed):
    """The parameters after 3 steps, and the optimizer's groups."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    low_rank = {} if optim == "adamw_torch" else {"optim_args": "rank=4", "optim_target_modules": "all-linear"}
    arguments = TrainingArguments(
        sys.argv[1] + "/run", optim=optim, learning_rate=0.01, max_steps=3, per_device_train_batch_size=4,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **low_rank, **(plain | changed),
    )
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return dict(model.named_parameters()), trainer.optimizer.param_groups


def differ(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for optim in ("adamw_torch", "galore_adamw", "apollo_adamw"):
    base, _ = trained(optim)
    again, _ = trained(optim)
    assert not differ(base, again), "runs do not repeat"
    for key, value in {"weight_decay": 0.1, "adam_beta2": 0.9, "adam_epsilon": 1e-2}.items():
        found = seen[optim, key] = differ(base, trained(optim, **{key: value})[0])
        print(f"{optim}: {key} = {value} changes {len(found)} of {len(base)} tensors")
    model, groups = trained(optim, adam_beta2=0.9)
    names = {id(p): name for name, p in model.items()}
    for group in groups:
        beta2 = group["betas"][1]
        has = [names[id(p)] for p in group["params"]]
        seen[optim, "rank" in group] = beta2, has
        print(f"  {'low rank' if 'rank' in group else 'plain'}: {len(has)} tensors, beta2 {beta2}, head among them: "
              f"{'lm_head.weight' in has}")

assert all(seen["adamw_torch", key] for key in ("weight_decay", "adam_beta2", "adam_epsilon")), "AdamW is no better"
for optim in ("galore_adamw", "apollo_adamw"):
    assert not seen[optim, "weight_decay"], "weight decay counts now"
    assert "lm_head.weight" in seen[optim, True][1], "the head is left out now"
    assert seen[optim, False][0] == 0.999, "embedding and norms have the beta2 of the run now"
assert not seen["galore_adamw", "adam_beta2"] and not seen["galore_adamw", "adam_epsilon"], "GaLore reads them now"
assert seen["galore_adamw", True][0] == 0.999 and seen["apollo_adamw", True][0] == 0.9
PY
