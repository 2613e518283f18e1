"""Counts, sizes and memory in messages."""

import pytest
import torch

from lowres.config import PRESETS, ModelConfig
from lowres.memory import make_plan
from lowres.model import count_parameters
from lowres.wording import counted
from tests.helpers import LLAMA3, SMALL, make_config


@pytest.mark.parametrize(
    "number, words", [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1.0, "1 row"), (12345, "12,345 rows")]
)
def test_counted(number: float, words: str) -> None:
    assert counted(number, "row") == words
    assert counted(number, "row is", "rows are").endswith("is" if number == 1 else "are")


OPTIONS: list[dict[str, object]] = [
    {},
    {"tie_embeddings": True, "n_kv_heads": 2},
    {"qkv_bias": True, "qk_norm": True, **LLAMA3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_number_of_parameters(options: dict[str, object]) -> None:
    model = SMALL.model_copy(update=options)
    assert model.parameters(model.vocab) == count_parameters(model)


def test_a_preset_is_said_with_both_sizes() -> None:
    for name in PRESETS:
        small = ModelConfig(preset=name, vocab_size=4096)
        assert small.parameters(32000) == count_parameters(ModelConfig(preset=name, vocab_size=32000))
    small = ModelConfig(preset="9m", vocab_size=4096)
    assert small.size == ("1.85 M parameters (preset 9m is named for 9.00 M with a vocabulary of 32,000)")
    assert ModelConfig(preset="9m").size == "9.00 M parameters" and "preset" not in SMALL.size


def test_a_cpu_has_one_memory() -> None:
    plan = make_plan(make_config(), torch.device("cpu"))
    assert "GPU" not in plan.in_words(torch.device("cpu"))
    assert plan.in_words(torch.device("cuda")).count("GiB on the") == 2
