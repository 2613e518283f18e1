"""The probe: its counts compared with numbers by hand and with the engine's real copies."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowres import rooms
from lowres.config import Config
from lowres.config_file import load_config, parse_config
from lowres.engine import Choice, make_engine
from lowres.memory import GIB, Plan, make_plan
from lowres.model import empty_units, initialize
from lowres.probe import (
    Probe,
    Rates,
    dequantised_elements,
    flops_per_token,
    predict,
    step_bytes,
    update_flops,
)
from lowres.probe import rates as measured
from lowres.rooms import Homes, Rooms
from tests.helpers import CPU, lowres_here, make_batch, make_config, make_optimizer

CUDA = torch.device("cuda")  # no device is needed to count
CONFIGS = Path(__file__).parent.parent / "configs"


def test_flops_of_llama_7b() -> None:
    """32 blocks of 4 * 4096^2 + 3 * 4096 * 11008 = 202,375,168 weights."""
    config, _ = load_config(CONFIGS / "llama_7b_24gb.toml")
    found = flops_per_token(config.model, 2048, 1)
    assert found["forward"] == 2 * 32 * 202_375_168 == 12_952_010_752
    assert found["backward"] == 2 * found["forward"]
    # without the down projections, 32 of 4096 * 11008
    assert found["recomputation"] == found["forward"] - 2 * 32 * 45_088_768
    assert found["head"] == 6 * 32000 * 4096 == 786_432_000
    # scores and values, half of 2048 positions: 2 * 2048 * 4096 operations; forward 1, again 1, backward 2.5
    assert found["attention"] == 2 * 2048 * 4096 * 32 * 9 // 2 == 2_415_919_104
    assert sum(found.values()) == pytest.approx(52.1e9, rel=1e-3)
    # clipped: a second backward pass, with its recomputation
    twice = flops_per_token(config.model, 2048, 1, passes=2)
    assert sum(twice.values()) - sum(found.values()) == (
        found["recomputation"] + found["backward"] + found["head"] + found["attention"] * 7 // 9
    )
    full = flops_per_token(config.model, 2048, 1, "autograd")
    assert full["recomputation"] == full["forward"]
    assert sum(full.values()) - full["head"] // 4 == pytest.approx(55.0e9, rel=1e-3)


@pytest.mark.parametrize("band, skipped", [(1, 5), (2, 3), (5, 1)])
def test_recomputation_leaves_out_the_last_product_of_a_band(band: int, skipped: int) -> None:
    model = make_config(model={"n_layers": 5}).model
    found = flops_per_token(model, 32, band)
    assert found["forward"] - found["recomputation"] == 2 * skipped * 64 * 172


def test_dequantised_elements() -> None:
    blocks, head = 3 * (4 * 64 * 64 + 3 * 64 * 172), 300 * 64

    def elements(dtype: torch.dtype, **memory: object) -> int:
        return dequantised_elements(make_config(memory=memory), dtype)

    assert elements(torch.bfloat16) == 2 * blocks  # embedding and head are kept in bf16
    assert elements(torch.float32) == 2 * blocks + head
    assert elements(torch.float32, weights="fp32") == 0
    assert elements(torch.float32, engine="autograd") == blocks + 2 * head
    clipped = make_config(optim={"grad_clip": 1.0})  # a second backward pass
    assert dequantised_elements(clipped, torch.float32) == 3 * blocks + 2 * head
    tied = make_config(model={"tie_embeddings": True})
    assert dequantised_elements(tied, torch.float32) == 2 * blocks + head


def test_bytes_of_llama_7b() -> None:
    """A boundary of 131,072 tokens is 1 GiB in bf16."""
    config, _ = load_config(CONFIGS / "llama_7b_24gb.toml")
    plan = make_plan(config, CUDA)
    stash = plan.choice.homes.stash
    assert 0 < stash < 32 and not plan.choice.homes.state
    assert step_bytes(config, plan, torch.bfloat16) == (2 * stash * GIB, stash * GIB)

    # without fused kernels, which leave room for two units on the GPU
    config, _ = load_config(CONFIGS / "llama_7b_8gb.toml", ["memory.kernels=plain"])
    plan = make_plan(config, CUDA)
    homes, bands = plan.choice.homes, 32 // plan.choice.band
    assert len(homes.weights) == len(homes.state) == 34 and homes.stash == bands and homes.carry
    fetched, stored = step_bytes(config, plan, torch.bfloat16)
    at_rest = plan.size("checkpoint")
    assert stored == at_rest + (bands + bands + 2) * GIB
    # the head's weights, 250 MiB in bf16, are fetched once, all others twice; its norm's are 16 KiB
    weights = at_rest - plan.size("optimizer state")
    assert fetched == at_rest + weights - 250 * 2**20 - 2**14 + (2 * bands + bands + 2) * GIB


def test_momentum_on_the_host_is_fetched_and_stored_once() -> None:
    config, _ = load_config(CONFIGS / "llama_7b_24gb.toml", ["optim.name=muon"])
    homes = Homes(state=frozenset(f"layers.{i}" for i in range(32)))
    plan = Plan((), Choice(1, 1, homes), 0, config.train.batch_tokens, {})
    # codes, a scale for 256 of them, two moments of two norms in fp32, and a count in a slot of 256 bytes
    layer = 202_375_168 + 202_375_168 // 256 * 4 + 2 * 2 * 4 * 4096 + 256
    assert step_bytes(config, plan, torch.bfloat16) == (32 * layer, 32 * layer)


ON_HOST = {"weights_on": "host", "state_on": "host", "stash_on": "host", "carry_on": "host"}
VARIANTS: dict[str, Mapping[str, object]] = {
    "gpu": {},
    "weights": {"weights_on": "host"},
    "state": {"state_on": "host"},
    "stash": {"stash_on": "host"},
    "carry": {"carry_on": "host"},
    "everything": ON_HOST,
    "everything, band 2": ON_HOST | {"band": 2},
    "master": {"master": "host"},
    "int8 stash": ON_HOST | {"stash_dtype": "int8"},
    "int8 stash, exact forward": ON_HOST | {"stash_dtype": "int8", "exact_forward": True},
}


@pytest.mark.parametrize("tied, clip", [(False, 0.0), (True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("memory", VARIANTS)
def test_counted_bytes_are_those_that_a_step_copies(
    memory: str, tied: bool, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        model={"tie_embeddings": tied, "n_layers": 5},
        train={"micro_batch": 3},
        memory=VARIANTS[memory],
        optim={"grad_clip": clip},
    )
    plan, kept = make_plan(config, CPU), config.memory
    room, choice = Rooms(CPU), plan.choice
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, room, choice.homes.weights)
    optimizer = make_optimizer(config, units, room, choice.homes.state)
    initialize(units.values(), 0, CPU)
    engine = make_engine(config, units, optimizer, room, choice)
    moved = {"fetch": 0, "store": 0}
    for direction in moved:

        def counted(
            mover: rooms.Mover, copies: rooms.Copies, after: object = (), direction: str = direction
        ) -> None:
            pairs = list(copies)
            moved[direction] += sum(source.nbytes for _, source in pairs)
            for destination, source in pairs:
                destination.copy_(source)

        monkeypatch.setattr(rooms.Mover, direction, counted)
    engine.step(make_batch(), 0, 1.0)
    fetched, stored = step_bytes(config, plan, torch.float32)
    # boundaries end at a multiple of 256 bytes, copies of their pieces do not
    assert moved["fetch"] == pytest.approx(fetched, rel=1e-2)
    assert moved["store"] == pytest.approx(stored, rel=1e-2)
    assert (fetched > 0) == (memory != "gpu")


RATES = Rates(
    device="none",
    compute="bfloat16",
    products_tflops=100.0,
    backward_products_tflops=50.0,
    block_forward_us=1.0,
    block_backward_us=3.0,
    loss_us=2.0,
    to_gpu_gb_s=20.0,
    to_host_gb_s=10.0,
    dequantise_g_s=100.0,
    update_g_s=10.0,
    update_products_tflops=None,
)


def planned(**sections: Mapping[str, object]) -> Config:
    base = {
        "model": {"dim": 1024, "n_layers": 4, "n_heads": 8, "ffn_dim": 2048, "vocab_size": 1000},
        "data": {"seq_len": 1000},
        "train": {"batch_tokens": 100_000, "steps": 50_000},
    }
    return parse_config(base | sections)[0]


def test_prediction_by_hand() -> None:
    config = planned()
    found = predict(config, make_plan(config, CUDA), RATES, CUDA)
    matrices, down, head = 4 * (4 * 1024**2 + 3 * 1024 * 2048), 4 * 1024 * 2048, 1000 * 1024
    forward, backward = 4 * matrices - 2 * down + 2 * head, 4 * (matrices + head)
    assert found.products_s == pytest.approx(1e5 * (forward / 100e12 + backward / 50e12))
    assert found.beside_products_s == pytest.approx(1e5 * (4 * 4.0 + 2.0) * 1e-6)
    assert found.dequantise_s == pytest.approx(2 * matrices / 100e9)
    assert found.update_s == pytest.approx((matrices + 2 * head + 9 * 1024) / 10e9)
    assert found.update_products_s == 0
    assert found.step_s == found.compute_s and found.transfer_s == 0 and found.limit == "compute"
    assert found.compute_s == pytest.approx(
        found.products_s + found.beside_products_s + found.dequantise_s + found.update_s
    )
    assert found.tokens_per_s == pytest.approx(1e5 / found.step_s)
    assert found.days_to_target == pytest.approx(50_000 * found.step_s / 86400)
    assert found.days_per_billion_tokens == pytest.approx(1e4 * found.step_s / 86400)


def test_products_of_an_update_are_divided_by_their_own_rate() -> None:
    """Muon's: 4 m^2 n + 2 m^3 for a matrix whose smaller side is m, in each of 5 steps."""
    config, rates = planned(optim={"name": "muon"}), replace(RATES, update_products_tflops=20.0)
    plan = make_plan(planned(), CUDA)
    flops = 4 * 5 * (4 * 6 * 1024**3 + 3 * (4 * 1024**2 * 2048 + 2 * 1024**3))
    assert update_flops(config) == flops and update_flops(planned()) == 0
    found, without = predict(config, plan, rates, CUDA), predict(config, plan, RATES, CUDA)
    assert found.update_products_s == pytest.approx(flops / 20e12) and without.update_products_s == 0
    assert found.update_s == pytest.approx(without.update_s + flops / 20e12)
    assert found.compute_s == pytest.approx(without.compute_s + flops / 20e12)
    assert found.gflops_per_token == pytest.approx(
        predict(planned(), plan, RATES, CUDA).gflops_per_token + flops / 1e5 / 1e9
    )
    printed = Probe(rates=rates, prediction=found, target_tokens=1, notes=[]).table()
    assert "products of updates 20 TFLOPS" in printed
    assert f"(of them products {flops / 20e12:.3g} s)" in printed


@pytest.mark.parametrize("name", ["muon", "apollo-mini"])
def test_the_rate_of_elements_is_without_the_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which 10^9 operations of a product take a second, and everything else one in all."""

    def seconds(work: Callable[[], object], device: torch.device) -> float:
        work()
        with FlopCounterMode(display=False) as counted:
            work()
        return 1 + (counted.get_total_flops() / 1e9 if name == "muon" else 0)

    monkeypatch.setattr(measured, "_seconds", seconds)
    _, update, products = measured._weights(make_config(optim={"name": name}), CPU, torch.float32)
    assert update == 4 * 64 * 64 + 3 * 64 * 172 + 2 * 64
    assert products == (pytest.approx(1e9) if name == "muon" else None)


def test_transfers_hide_behind_the_computation_on_a_gpu_only() -> None:
    config = planned(memory={"stash_on": "host", "compute": "bf16"})
    plan = make_plan(config, CUDA)
    boundary = 100_000 * 1024 * 2
    parallel = predict(config, plan, RATES, CUDA)
    there, back = 8 * boundary / 20e9, 4 * boundary / 10e9
    assert parallel.transfer_s == pytest.approx(max(there, back)) and parallel.limit == "compute"
    assert parallel.step_s == parallel.compute_s
    assert predict(config, plan, RATES, CPU).step_s == pytest.approx(parallel.compute_s + there + back)
    slow = Rates(**{**asdict(RATES), "to_gpu_gb_s": 0.01})
    limited = predict(config, plan, slow, CUDA)
    assert limited.limit == "transfers" and limited.step_s == limited.transfer_s > parallel.step_s


def test_plan_with_a_probe() -> None:
    found = json.loads(lowres_here("plan", CONFIGS / "tiny.toml", "--probe", "--json").stdout)
    numbers = {key: value for key, value in found["probe"].items() if isinstance(value, int | float)}
    assert {
        "products_tflops",
        "to_gpu_gb_s",
        "update_g_s",
        "tokens_per_s",
        "days_to_target",
    } <= numbers.keys()
    assert all(value > 0 for key, value in numbers.items() if key not in NOT_DONE), numbers
    assert all(numbers[key] == 0 for key in NOT_DONE)
    assert numbers["target_tokens"] == 400 * 4096
    assert found["probe"]["limit"] == "compute"
    # the vocabulary of the future tokenizer, not of the preset
    assert found["parameters"] < 2_000_000


NOT_DONE = ("to_gpu_gb", "to_host_gb", "transfer_s", "update_products_s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_probe_of_a_config_for_a_gpu_without_one() -> None:
    options = ("--set", "run.device=cuda", "--set", "memory.stash_on=host")
    printed = lowres_here("plan", CONFIGS / "tiny.toml", *options, "--probe").stdout
    assert "are for this CPU" in printed and "tokens/s" in printed
    refused = lowres_here(
        "plan", CONFIGS / "tiny.toml", "--set", "memory.budget_gib=0.001", "--probe", code=3
    )
    assert "tokens/s" not in refused.stdout
