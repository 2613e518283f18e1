"""Tuning against TRL: the same model, chats, template, order and optimizer give the same numbers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

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
# SFTTrainer finds what is trained by marks in a template, lowres by the text that it writes. Nothing comes
# after an answer, because DPOTrainer would train it.
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


def pairs(length: int = 0) -> Rows:
    """length: letters of an answer; 0: they are uneven, and can be told apart."""
    draw = random.Random(1)

    def answer(better: bool) -> str:
        if length:
            return "".join(draw.choices("abc", k=length))
        return ("yes " if better else "no ") + some_words(draw, 5)

    return [
        {
            "prompt": [said("user", some_words(draw, 4))],
            "chosen": [said("assistant", answer(True))],
            "rejected": [said("assistant", answer(False))],
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


def theirs(world: World, rows: Rows, trainer: str, name: str, micro_batch: int = BATCH, **more: Any) -> Any:
    """A trainer of trl after the same steps."""
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
    return made


STEP = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm"}
ACCURACY = {"accuracy": "rewards/accuracies"}
REWARDS = {
    "margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}
LOGP = {"logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}


def assert_equal(mine: Rows, trainer: Any, names: dict[str, str], factor: float = 1.0) -> None:
    """names: of a number of ours -> of theirs, which is `factor` times as large."""
    other = [one for one in trainer.state.log_history if "loss" in one]
    assert len(mine) == len(other) == STEPS
    for our, their in names.items():
        # until the first update the accuracy is that of noise around 0
        since = 2 if our == "accuracy" else 0
        found, wanted = ([one[key] for one in rows[since:]] for key, rows in ((our, mine), (their, other)))
        wanted = [number / factor for number in wanted]
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), our
        assert len(set(found)) > 1, f"{our} is always {found[0]}, so nothing is compared"


def test_supervised(world: World) -> None:
    """Some chats are cut, and the micro-batches are others on both sides."""
    rows = chats()
    mine = ours(world, rows, "sft", {"name": "sft"}, micro_batch=1)
    trainer = theirs(world, rows, "SFT", "trl-sft", micro_batch=2, assistant_only_loss=True)
    assert_equal(mine, trainer, STEP)
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1

    # the mean of the means of micro-batches, as many trainers have it, is another loss
    model = transformers.LlamaForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    first = trainer.train_dataset.select(range(BATCH))
    assert max(map(len, first["input_ids"])) == LENGTH
    sums, counts = [], []
    for row in first:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
        counts.append(int((labels != -100).sum()))
    assert mine[0]["loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
    assert mine[0]["targets"] == sum(counts)
    means = [sum(sums[i : i + 2]) / sum(counts[i : i + 2]) for i in range(0, BATCH, 2)]
    assert abs(sum(means) / len(means) - mine[0]["loss"]) > 1e-3


@pytest.mark.parametrize(("loss", "beta", "precomputed"), [("sigmoid", 0.1, False), ("ipo", 0.5, True)])
def test_sums_and_means(world: World, loss: str, beta: float, precomputed: bool) -> None:
    mine = ours(world, pairs(), loss, {"name": "dpo", "loss": loss, "beta": beta})
    kind: dict[str, Any] = {"loss_type": [loss], "beta": beta, "precompute_ref_log_probs": precomputed}
    trainer = theirs(world, pairs(), "DPO", f"trl-{loss}", **kind)
    # trl's rewards are of sums, also where its loss is of means
    assert_equal(mine, trainer, STEP | (ACCURACY | REWARDS if loss == "sigmoid" else {}))
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1


@pytest.mark.parametrize(("length", "precomputed"), [(0, True), (9, False)])
def test_length_normalised(world: World, length: int, precomputed: bool) -> None:
    """length: see `pairs`."""
    rows = pairs(length)
    mine = ours(world, rows, f"norm-{length}", {"name": "dpo", "loss": "sigmoid_norm", "beta": 5.0})
    kind: dict[str, Any] = {
        "loss_type": ["sigmoid_norm"],
        "beta": 5.0,
        "precompute_ref_log_probs": precomputed,
    }
    trainer = theirs(world, rows, "DPO", f"trl-norm-{length}", **kind)
    assert_equal(mine, trainer, STEP)
    if length:
        tokens = length + 1
        assert {one[key] for one in mine for key in ("length_chosen", "length_rejected")} == {tokens}
        assert_equal(mine, trainer, ACCURACY)
        assert_equal(mine, trainer, REWARDS | LOGP, factor=tokens)
    else:
        assert mine[-1]["loss"] < mine[0]["loss"] - 0.1


def test_simpo() -> None:
    """By the loss of trl's CPOTrainer, which takes means."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (10,), generator=draw)
    means = -3 * torch.rand(10, dtype=torch.float64, generator=draw)
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=2.5,
        simpo_gamma=1.4,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    wanted, chosen, rejected = CPOTrainer.cpo_loss(settings, means[0::2], means[1::2])
    objective = Preference("simpo", 2.5, 1.4)
    found, readings = objective(Examples(means * counts, counts, None, torch.arange(10)))
    assert float(found) == pytest.approx(float(wanted.mean()), rel=1e-12)
    said_by = dict(zip(objective.names, map(float, readings), strict=True))
    assert said_by["reward_chosen"] == pytest.approx(float(chosen.mean()), rel=1e-12)
    assert said_by["reward_rejected"] == pytest.approx(float(rejected.mean()), rel=1e-12)
