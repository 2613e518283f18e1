"""Tuning against TRL: the same model, chats, template, order and optimizer give the same numbers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# before it is imported
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
trl = pytest.importorskip("trl", reason="pip install lowres[oracles]")

import tokenizers  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import decoders, pre_tokenizers  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402

from lowres import metrics  # noqa: E402
from lowres.objective import Examples, Preference  # noqa: E402
from lowres.rng import make_key, permutation  # noqa: E402
from tests.helpers import lowres_here  # noqa: E402

STEPS, BATCH, LENGTH = 10, 6, 96
# SFTTrainer finds what is trained by marks in a template, lowres by the text that it writes. Nothing comes after an
# answer, because DPOTrainer would train it.
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
Rows = list[dict[str, Any]]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def some_words(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(("red", "blue", "go", "slowly", "x"), k=draw.randint(1, most)))


def chats() -> Rows:
    """Of one or two turns; some are longer than LENGTH."""
    draw = random.Random(0)
    return [
        {
            "messages": [
                said(role, some_words(draw, 6))
                for _ in range(draw.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(STEPS * BATCH)
    ]


def pairs(*lengths: int) -> Rows:
    """lengths: letters of the chosen and the rejected answers; none: they are uneven."""
    draw = random.Random(1)

    def answer(which: int) -> str:
        return "".join(draw.choices("abc", k=lengths[which])) if lengths else some_words(draw, 5)

    return [
        {
            "prompt": [said("user", some_words(draw, 4))],
            "chosen": [said("assistant", "yes " + answer(0))],
            "rejected": [said("assistant", "no " + answer(1))],
        }
        for _ in range(STEPS * BATCH)
    ]


class World(NamedTuple):
    """folder: for files. model: a folder of transformers."""

    folder: Path
    model: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("oracle")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(fast),
        initializer_range=0.1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    return World(folder, folder / "model")


def ours(world: World, rows: Rows, name: str, objective: dict[str, Any], micro_batch: int = 2) -> Rows:
    """Records of the steps of `lowres train`. micro_batch: windows."""
    for file, found in (("train", rows), ("val", rows[:1])):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (world.folder / f"{name}-{file}.jsonl").write_text(text)
    sections: dict[str, dict[str, Any]] = {
        "run": {"device": "cpu", "seed": 3},
        "data": {
            "source": str(world.folder / f"{name}-train.jsonl"),
            "val_source": str(world.folder / f"{name}-val.jsonl"),
            "cache": str(world.folder / "cache"),
            "seq_len": LENGTH,
            "drop_duplicates": False,
            "max_overlap": 1.0,
        },
        "objective": objective,
        "memory": {
            "engine": "layerwise",
            "weights": "fp32",
            "compute": "fp32",
        },
        "optim": {"name": "adamw", "lr": 0.002, "betas": [0.9, 0.98], "eps": 1e-7, "grad_clip": 0.0},
        "schedule": {"name": "linear", "warmup_ratio": 0.3, "min_ratio": 0.0},
        "train": {
            "batch_tokens": BATCH * LENGTH,
            "micro_batch": micro_batch,
            "steps": STEPS,
            "eval_every": 0,
        },
        "log": {"progress": False, "sample_tokens": 0},
    }
    lines = []
    for section, keys in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    config, run = world.folder / f"{name}.toml", world.folder / name
    config.write_text("\n".join(lines))
    lowres_here("train", config, "--init-from", world.model, "--run", run)
    return [one for one in metrics.read(run / "metrics.jsonl") if "lr" in one]


def in_our_order(rows: Rows) -> Dataset:
    return Dataset.from_list([rows[i] for i in permutation(make_key(3, "data order", step=0), len(rows))])


def theirs(world: World, rows: Rows, trainer: str, name: str, micro_batch: int = BATCH, **more: Any) -> Rows:
    """What a trainer of trl logs for the same steps."""
    arguments = getattr(trl, f"{trainer}Config")(
        output_dir=str(world.folder / name),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        max_steps=STEPS,
        max_length=LENGTH,
        learning_rate=0.002,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-7,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="linear",
        warmup_steps=3,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    made = getattr(trl, f"{trainer}Trainer")(
        model=model,
        args=arguments,
        train_dataset=in_our_order(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(world.model),
    )
    made.train()
    return [one for one in made.state.log_history if "loss" in one]


def values(records: Sequence[dict[str, Any]], key: str) -> Tensor:
    found = torch.tensor([one[key] for one in records], dtype=torch.float64)
    assert len(found) == STEPS
    return found


def assert_equal(mine: Tensor, other: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(mine, other * scale, rtol=1e-5, atol=1e-5)



@pytest.mark.parametrize(("micro_batch", "accumulated"), [(2, BATCH), (1, 2)])
def test_supervised(world: World, micro_batch: int, accumulated: int) -> None:
    """Some chats are cut; micro-batches are others on both sides."""
    rows, name = chats(), f"sft-{accumulated}"
    mine = ours(world, rows, name, {"name": "sft"}, micro_batch)
    other = theirs(world, rows, "SFT", f"trl-{name}", accumulated, assistant_only_loss=True)
    assert_equal(values(mine, "loss"), values(other, "loss"))
    assert_equal(values(mine, "lr"), values(other, "learning_rate"))
    assert_equal(values(mine, "grad_norm"), values(other, "grad_norm"))
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1


@pytest.mark.parametrize(
    ("loss", "beta", "lengths", "precomputed"),
    [("sigmoid_norm", 5.0, (), True), ("sigmoid_norm", 5.0, (6, 11), False), ("sigmoid", 0.1, (), False), ("ipo", 0.5, (), True)],
)
def test_preferences(world: World, loss: str, beta: float, lengths: tuple[int, ...], precomputed: bool) -> None:
    rows, name = pairs(*lengths), f"{loss}-{len(lengths)}"
    mine = ours(world, rows, name, {"name": "dpo", "loss": loss, "beta": beta})
    other = theirs(
        world, rows, "DPO", f"trl-{name}", loss_type=[loss], beta=beta, precompute_ref_log_probs=precomputed
    )
    print(name, (values(mine, "loss") - values(other, "loss")).abs().max(), values(mine,"loss"))
    print(mine[-1], other[-1])
    assert_equal(values(mine, "loss"), values(other, "loss"))
    assert mine[-1]["loss"] < mine[0]["loss"]
