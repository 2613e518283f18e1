#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0: DPOTrainer with precompute_ref_log_probs=True.
#
# A guess: what the reference model thinks of the answers is cached under a hash of all that decides it. Seen: the
# hash is of the prepared data and of the weights. It lacks the length to which the collator cuts with
# truncation_mode="keep_end" (with "keep_start" the length is in it, by way of a filter), and whatever else is in the
# config of the model, such as rope_theta. A second run with a larger max_length, on the same data and model, takes the
# sums of the first run, over fewer tokens. Where policy and reference are one model the loss of the first step is
# log 2; here it is 0.10, with a margin of 12 that nobody has learnt, and nothing is said.
# The documentation of the option speaks of memory only. A cache of reference log-probabilities must be keyed by the
# config of the model, the number format and the length too; whether the first loss is log 2 is a cheap check.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    trl==1.16.0 transformers==5.24.0 tokenizers==0.23.3 datasets==5.2.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import json
import math
import tempfile

import torch
import transformers
import trl
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers

folder = tempfile.mkdtemp()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<end>"])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
PAIRS = (("yes, of course", "no"), ("green", "blue, or rather red"))
with open(f"{folder}/pairs.jsonl", "w") as file:
    for chosen, rejected in PAIRS:
        print(json.dumps({"prompt": "a long question " * 2, "chosen": chosen, "rejected": rejected}), file=file)


def first_step(mode, length, rope_theta=10000.0):
    """Loss and margin of a model whose reference is itself."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
    )
    arguments = trl.DPOConfig(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=len(PAIRS),
        beta=1.0,
        max_length=length,
        truncation_mode=mode,
        precompute_ref_log_probs=True,
        learning_rate=0.0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=folder)
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    said = trainer.state.log_history[0]
    loss, margin = said["loss"], said["rewards/margins"]
    print(f"-> {mode} {length}, rope_theta {rope_theta:g}: loss {loss:.4f}, margin {margin:.3f}")
    return abs(loss - math.log(2)) < 1e-4


print("-> trl", trl.__version__, "transformers", transformers.__version__)
assert first_step("keep_end", 16)
assert not first_step("keep_end", 64), "the length is part of the key now"
assert first_step("keep_start", 40) and first_step("keep_start", 64)
assert not first_step("keep_start", 64, rope_theta=500.0), "the config of the model is part of the key now"
PY
(cd "$folder" && HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore look.py > out 2> err) ||
    { cat "$folder/err"; exit 1; }
sed -n 's/^-> //p' "$folder/out"
