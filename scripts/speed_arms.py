"""The trainers that `bench_speed.py` compares, each in a process of its own that does a step when it is told.

    python scripts/speed_arms.py '{"arm": "plain", "preset": "60m", ...}'

Every line on stdin asks for one optimizer step. The answer is a line of JSON: first what the arm is (or why
it refuses), then seconds and loss of a step. All train the same LLaMA on random tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as on a machine where lowres is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lowres.config import Config, ModelConfig  # noqa: E402
from lowres.config_file import load_config  # noqa: E402
from lowres.errors import UserError  # noqa: E402
from lowres.meter import rss_gib  # noqa: E402
from lowres.probe import flops_per_token  # noqa: E402
from lowres.speed import Subject  # noqa: E402

LR = 1e-3
CPU = torch.device("cpu")
# Q-APOLLO-Mini's settings in transformers: rank 1, one scale per tensor; matrices of attention and MLP
APOLLO_MINI = "rank=1,scale=128.0,scale_type=tensor,proj=random,update_proj_gap=200"
MATRICES = [r".*\.self_attn\..*", r".*\.mlp\..*"]
PLAIN, TRAINER, BF16 = "plain", "hf-trainer", "-bf16"
OTHERS = (PLAIN, PLAIN + BF16, TRAINER, TRAINER + BF16)

Steps = Iterator[dict[str, Any]]


class Channel:
    """To the process that asks. What libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cpu = 0.0

    def wait(self) -> bool:
        """Until a step is asked for; False: there will be none."""
        found = bool(sys.stdin.readline())
        self._cpu = time.process_time()
        return found

    def did(self, seconds: float, loss: float | None) -> None:
        """A step is done."""
        cpu = time.process_time() - self._cpu
        self.tell(seconds=seconds, cpu_seconds=cpu, loss=loss, peak_rss_gib=rss_gib())

    def tell(self, **found: Any) -> None:
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


def ours_config(preset: str, seq_len: int, batch_tokens: int, overrides: list[str]) -> Config:
    """A config of ours; the overrides come last."""
    keys = [f"model.preset={preset}", f"data.seq_len={seq_len}", f"train.batch_tokens={batch_tokens}"]
    keys += ["run.device=cpu", "optim.name=apollo-mini", f"optim.lr={LR}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "bench.toml"
        empty.touch()
        try:
            config, _ = load_config(empty, keys)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{empty}: ")) from None
    return config.with_vocab(config.model.vocab)


def random_tokens(vocab: int, sequences: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def ours(asked: dict[str, Any], channel: Channel) -> None:
    """The engine of a run, with the overrides of the arm."""
    config = ours_config(asked["preset"], asked["seq_len"], asked["batch_tokens"], asked["set"])
    subject, kept = Subject(config, CPU), config.memory
    channel.tell(
        what=f"lowres: {config.optim.name}, {kept.weights} weights, {kept.engine} engine",
        settings=asked["set"],
        micro_batch=subject.plan.micro_batch,
        parameters=subject.plan.parameters,
        compute=subject.products_in,
        hardware_flops_per_token=subject.hardware_flops_per_token,
    )
    for step in iter_steps(channel):
        seconds, loss = subject.step(None, step)
        channel.did(seconds, loss)


def iter_steps(channel: Channel) -> Iterator[int]:
    step = 0
    while channel.wait():
        yield step
        step += 1


def llama(model: ModelConfig, seq_len: int) -> Any:
    """transformers' LLaMA of the same shape, in fp32, with attention by PyTorch's fused kernel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=seq_len,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(shape)


def checkpointed_flops(model: ModelConfig, seq_len: int) -> int:
    """Per token, where every block is checkpointed as a whole and the head is not."""
    found = flops_per_token(model, seq_len, 1, "autograd")
    return sum(found.values()) - 2 * model.vocab * model.dim


def plain(asked: dict[str, Any], channel: Channel) -> None:
    """A loop as one writes it: gradient checkpointing, accumulated micro-batches, fused AdamW."""
    model, half = (
        ours_config(asked["preset"], asked["seq_len"], asked["batch_tokens"], []).model,
        asked["bf16"],
    )
    net = llama(model, asked["seq_len"])
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True)
    sequences, micro_batch = asked["batch_tokens"] // asked["seq_len"], asked["micro_batch"]
    channel.tell(
        what="transformers' LlamaForCausalLM, fp32 weights, gradient checkpointing (not reentrant), "
        f"torch.optim.AdamW(fused=True), {'bf16 autocast' if half else 'fp32'}",
        micro_batch=micro_batch,
        parameters=sum(p.numel() for p in net.parameters()),
        compute="bf16" if half else "fp32",
        hardware_flops_per_token=checkpointed_flops(model, asked["seq_len"]),
    )
    for step in iter_steps(channel):
        tokens = random_tokens(model.vocab, sequences, asked["seq_len"], step + 1)
        began, total = time.perf_counter(), 0.0
        for part in tokens.split(micro_batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = net(input_ids=part, labels=part).loss * (len(part) / sequences)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        channel.did(time.perf_counter() - began, total)


def hf_trainer(asked: dict[str, Any], channel: Channel) -> None:
    """transformers' Trainer with layer-wise APOLLO-Mini. It refuses gradient accumulation, so the whole step
    is one batch. A step is timed from its beginning to its end, without the loading of the batch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, half = (
        ours_config(asked["preset"], asked["seq_len"], asked["batch_tokens"], []).model,
        asked["bf16"],
    )
    net, sequences = llama(model, asked["seq_len"]), asked["batch_tokens"] // asked["seq_len"]

    class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return sequences * asked["most_steps"]

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = random_tokens(model.vocab, 1, asked["seq_len"], index + 1)[0]
            return {"input_ids": tokens, "labels": tokens}

    class Turns(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not channel.wait():
                os._exit(0)  # the Trainer cannot end before a step
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            channel.did(time.perf_counter() - self.began, None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=half,
            optim="apollo_adamw_layerwise",
            optim_args=APOLLO_MINI,
            optim_target_modules=MATRICES,
            per_device_train_batch_size=sequences,
            gradient_accumulation_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=LR,
            max_grad_norm=0.0,
            max_steps=asked["most_steps"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=net, args=arguments, train_dataset=Data(), callbacks=[Turns()])
        channel.tell(
            what="transformers' Trainer, optim=apollo_adamw_layerwise, fp32 weights, gradient checkpointing "
            f"(not reentrant), no clipping, {'bf16 autocast' if half else 'fp32'}; it refuses gradient "
            "accumulation, so the whole step is one batch",
            optim_args=APOLLO_MINI,
            micro_batch=sequences,
            parameters=sum(p.numel() for p in net.parameters()),
            compute="bf16" if half else "fp32",
            hardware_flops_per_token=checkpointed_flops(model, asked["seq_len"]),
        )
        trainer.train()


def trainer_of(asked: dict[str, Any]) -> Callable[[dict[str, Any], Channel], None]:
    name = asked["arm"].removesuffix(BF16)
    if "set" in asked:
        return ours
    return {PLAIN: plain, TRAINER: hf_trainer}[name]


def main() -> None:
    channel, asked = Channel(), json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    asked["bf16"] = asked["arm"].endswith(BF16)
    try:
        trainer_of(asked)(asked, channel)
    except (UserError, RuntimeError, ImportError, ValueError) as error:
        channel.tell(refused=(str(error).splitlines() or [type(error).__name__])[0])


if __name__ == "__main__":
    main()
