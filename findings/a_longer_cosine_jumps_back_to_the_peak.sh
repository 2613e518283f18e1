#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU build): a Trainer with a cosine schedule that is resumed with a larger
# max_steps.
#
# A guess: a checkpoint has the state of the schedule, so a run that is resumed goes on at the learning rate that it had.
# Seen: the state has the number of steps and no length. The schedule is made anew for the new length, and its rate at
# this step is near the peak again: a run that has ended at a rate of 0 takes one step with 0 (the last rate, which the
# state has too), and from the next step on 0.97 of the peak, without a word. The comparison of arguments with those of
# the checkpoint does not look at max_steps.
# Train for longer on purpose: with a schedule that has no end (warmup_stable_decay before its decay), or anew from the
# weights, with a warm-up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

PEAK = 1e-3


def rates(steps, checkpoint=None):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (64, 16))]
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=steps,
        lr_scheduler_type="cosine",
        learning_rate=PEAK,
        save_steps=64,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {each["step"]: each["learning_rate"] for each in trainer.state.log_history if "learning_rate" in each}


first = rates(64)
longer = rates(600, "out/checkpoint-64")
print("64 steps: rates of the first, the middle and the last:", *(f"{first[step]:.2e}" for step in (1, 32, 64)))
print("resumed for 600: rates of 64, 65 and 66:", *(f"{longer[step]:.2e}" for step in (64, 65, 66)))
assert first[64] < 0.01 * PEAK and longer[65] == 0 and longer[66] > 0.9 * PEAK, "mended"
PY
cd "$folder"
"$folder/venv/bin/python" look.py 2>/dev/null | grep rates
