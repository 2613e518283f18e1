#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0: DPOTrainer with loss_type sigmoid_norm (the loss of Tulu 3) or ipo.
#
# A guess: the rewards that are logged are those in the loss, so an accuracy of 1 goes with a loss below log 2.
# Seen: both losses compare means over the tokens of an answer, but the logged rewards, margins and accuracies are of
# sums, whatever the loss. Where the chosen answers are longer, the accuracy can be 1 and the margin large, while the
# loss has every pair in the wrong order, and the other way round. Nothing in the documentation of the metrics says so.
# With length normalisation, log the rewards that are in the loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    trl==1.16.0 transformers==5.24.0 tokenizers==0.23.3 datasets==5.2.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import math
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.add_special_tokens(["<end>"])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def model(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            initializer_range=0.1,
        )
    )


def growth(answer):
    """By how much the mean log-probability of an answer differs between policy and reference."""
    ids = torch.tensor([tokenizer("q" + answer + "<end>")["input_ids"]])
    with torch.no_grad():
        before, after = (
            model(seed)(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).mean() for seed in (1, 0)
        )
    return float(after - before)


def first_step(kind, pairs):
    arguments = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(pairs),
        loss_type=[kind],
        beta=1.0,
        learning_rate=0.0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=model(0),
        ref_model=model(1),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    said = trainer.state.log_history[0]
    return said["loss"], said["rewards/accuracies"], said["rewards/margins"]


print("-> trl", trl.__version__, "transformers", transformers.__version__)
alphabet = "abcdefghijklmnopqrstuvwxyz"
# grown in all: the long ones; by token: the short ones
short = sorted((letter * 2 for letter in alphabet), key=growth)[-2:]
long = sorted((letter * 60 for letter in alphabet if growth(letter * 60) > 0.2), key=growth)[:2]
assert all(growth(a) < growth(b) and 61 * growth(a) > 3 * growth(b) for a, b in zip(long, short, strict=True))
right = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in zip(long, short, strict=True)]
wrong = [{"prompt": "q", "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in right]
for name, pairs in (("longer answers chosen", right), ("shorter answers chosen", wrong)):
    means = sum(growth(pair["chosen"]) - growth(pair["rejected"]) for pair in pairs) / len(pairs)
    for kind in ("sigmoid", "sigmoid_norm"):
        loss, accuracy, margin = first_step(kind, pairs)
        print(f"-> {name}, {kind}: loss {loss:.3f}, accuracy {accuracy:.0f}, margin {margin:.1f}, of means {means:.2f}")
        agree = (loss < math.log(2)) == (accuracy == 1)
        assert agree == (kind == "sigmoid"), "accuracy and loss are of the same rewards now"
PY
(cd "$folder" && HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore look.py > out 2> err) ||
    { cat "$folder/err"; exit 1; }
sed -n 's/^-> //p' "$folder/out"
