#!/usr/bin/env bash
# litgpt 0.5.13, lightning 2.6.6, torch 2.13.0: what `litgpt pretrain` prints when it ends.
#
# A guess: "Tok/sec" is "Total tokens" divided by "Training Time", which stand beside it.
# Seen: it is the tokens divided by the moment at which training began, on a clock that counts from the start of the machine.
# So the same run is slower on a machine that has been up for longer; here thousands of times. The rates that it logs on the
# way are not concerned.
# So a rate of litgpt's pretraining should be taken from the two other numbers, as here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check litgpt==0.5.13 lightning==2.6.6 torch==2.13.0 \
    numpy==2.4.6 requests==2.34.2
cat > "$folder/look.py" <<'PY'
import io
import os
import re
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch.utils.data import DataLoader

os.environ["LT_ACCELERATOR"] = "cpu"
sys.argv = ["pretrain.py", "tiny"]


class Numbers(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(torch.randint(0, 16, (4096, 33)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


config = Config(
    name="tiny", block_size=32, n_layer=1, n_embd=16, n_head=2, vocab_size=16, padded_vocab_size=16, bias=False,
    rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=32,
)
printed, began = io.StringIO(), time.perf_counter()
with redirect_stdout(printed):
    pretrain.setup(
        "tiny",
        model_config=config,
        out_dir=Path("out"),
        precision="32-true",
        data=Numbers(),
        train=TrainArgs(
            global_batch_size=8, micro_batch_size=8, max_tokens=8 * 32 * 500, max_norm=1.0, log_interval=100,
            lr_warmup_steps=1, save_interval=None,
        ),
        eval=EvalArgs(interval=100_000, max_iters=1, initial_validation=False),
        logger_name="csv",
    )
found = {name: re.search(rf"{name} *: ([\d.,]+)", printed.getvalue())[1] for name in ("Total tokens", "Training Time", "Tok/sec")}
tokens, seconds, rate = (float(text.replace(",", "")) for text in found.values())
print(f"{tokens:,.0f} tokens in {seconds:.2f} s are {tokens / seconds:,.0f} tokens/s; litgpt prints {rate:,.2f}")
print(f"the clock stood at {began:,.0f} s before the run; tokens / that: {tokens / began:,.2f}")
# the clock goes on while the model is made; two digits are printed
assert tokens / (began + 120) - 0.01 <= rate <= tokens / began + 0.01
assert rate < tokens / seconds / 10
PY
cd "$folder"
TORCH_COMPILE_DISABLE=1 venv/bin/python -W ignore look.py
