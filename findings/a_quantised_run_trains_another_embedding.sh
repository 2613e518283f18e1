#!/usr/bin/env bash
# litgpt 0.5.13, bitsandbytes 0.50.2, lightning 2.6.6, torch 2.13.0: litgpt finetune_lora --quantize bnb.nf4 (QLoRA).
#
# A guess: --quantize changes how the frozen matrices are stored, and nothing else; the merged model is the trained one.
# Seen: it also replaces the embedding with bitsandbytes.nn.StableEmbedding, which ends in a LayerNorm. The LayerNorm is in
# no checkpoint and is not trained, so adapters are trained for a model that starts far from the given one, and
# "final/lit_model.pth" is another model than the one whose validation loss was printed. finetune_adapter and
# finetune_adapter_v2 have the same lines.
# So the loss of a QLoRA model of litgpt should be taken from the merged checkpoint.
#
# Lightning allows bitsandbytes on CUDA only. Here a stand-in for its plugin leaves the matrices in fp32, so that what is seen
# on a CPU is the embedding alone; everything else is litgpt's own run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check litgpt==0.5.13 bitsandbytes==0.50.2 lightning==2.6.6 \
    torch==2.13.0 numpy==2.4.6 requests==2.34.2
cat > "$folder/look.py" <<'PY'
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from lightning.fabric.plugins.precision import Precision
from litgpt import GPT
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.finetune import lora
from litgpt.prompts import PromptStyle
from tokenizers import Tokenizer, models, pre_tokenizers

VALUES, BASE = 13, Path("base")
os.environ["LT_ACCELERATOR"] = "cpu"
sys.argv = ["lora.py", str(BASE)]


class StandIn(Precision):
    def __init__(self, mode, dtype):
        pass


class Plain(PromptStyle):
    def apply(self, prompt, **_):
        return prompt + " "


def sequence(random):
    """Each number is the sum of the two before it: a task that needs attention."""
    numbers = torch.randint(0, VALUES, (2,), generator=random).tolist()
    while len(numbers) < 24:
        numbers.append((numbers[-1] + numbers[-2]) % VALUES)
    return numbers


def make_base(random):
    config = Config(
        name="tiny", block_size=64, n_layer=4, n_embd=64, n_head=4, vocab_size=16, padded_vocab_size=16, bias=False,
        rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        intermediate_size=128,
    )
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(600):
        ids = torch.tensor([[1] + [n + 3 for n in sequence(random)] + [2] for _ in range(32)])
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    BASE.mkdir()
    torch.save(model.state_dict(), BASE / "lit_model.pth")
    (BASE / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    names = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n + 3 for n in range(VALUES)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(BASE / "tokenizer.json"))
    kind = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (BASE / "tokenizer_config.json").write_text(json.dumps(kind))
    rows = [[f"w{n}" for n in sequence(random)] for _ in range(128)]
    rows = [{"instruction": " ".join(row[:2]), "output": " ".join(row[2:])} for row in rows]
    Path("data.json").write_text(json.dumps(rows))


def run(source, out, quantize, steps):
    """The validation losses that litgpt prints: of the given model, and after training."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        lora.setup(
            source,
            out_dir=Path(out),
            precision="32-true",
            quantize=quantize,
            data=JSON(Path("data.json"), True, 0.25, Plain(), num_workers=0),
            train=TrainArgs(
                global_batch_size=8, micro_batch_size=8, lr_warmup_steps=1, epochs=1000, max_steps=steps, log_interval=1,
                save_interval=10_000,
            ),
            eval=EvalArgs(interval=10_000, max_new_tokens=1, initial_validation=True),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
        )
    first = re.search(r"step 1 \|.* val: ([\d.]+)", printed.getvalue())
    last = re.search(r"Final evaluation \| val loss: ([\d.]+)", printed.getvalue())
    return float(first[1]), float(last[1])


torch.manual_seed(0)
make_base(torch.Generator().manual_seed(1))
lora.BitsandbytesPrecision = StandIn
for name, quantize in [("without --quantize", None), ("--quantize bnb.nf4", "bnb.nf4")]:
    out = f"out-{quantize}"
    given, trained = run(BASE, out, quantize, 300)
    merged, _ = run(Path(out) / "final", f"{out}-again", None, 2)
    print(f"{name}: given model {given}, after 300 steps {trained}, its final/lit_model.pth {merged}")
    if quantize is None:
        assert abs(trained - merged) < 0.002 and max(given, trained) < 0.1
        plain = given
    else:
        assert given > plain + 1, "the embedding is the given one now"
        assert abs(merged - trained) > 0.1, "the merged model is the trained one now"
PY
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore look.py 2>/dev/null
