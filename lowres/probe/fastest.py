"""Which arithmetic is fastest: measures a step of the run's own layer and head in each, when a run starts.

The answer differs from CPU to CPU: INT8 products are several times faster than fp32 ones with VNNI, bf16 ones
with AMX, and without either both are slower. So nothing is guessed from the name of a CPU or a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowres.config import Config
from lowres.device import BF16
from lowres.engine import Choice, EngineSettings, LayerwiseEngine
from lowres.kernels import forms, product
from lowres.model import count_parameters, empty_units, initialize
from lowres.rooms import Rooms, is_out_of_memory
from lowres.storage import Unit

# floating-point operations of a run that takes minutes in fp32 on two cores; shorter runs do not measure
WORTH_MEASURING = 3e13
# of a measured step of one layer, if that leaves enough tokens for products as in the run
MOST_FLOPS, LEAST_TOKENS = {"cpu": 1e11, "cuda": 2e13}, 64
# a measurement is repeated this often, or until it has taken this many seconds
REPEATS, ENOUGH_SECONDS = 3, 1.0
# what is tried, by name
CANDIDATES = {
    "fp32": {"compute": "fp32"},
    "bf16": {"compute": "bf16"},
    "int8, rest in fp32": {"compute": "int8", "activations": "fp32"},
    "int8, rest in bf16": {"compute": "int8", "activations": "bf16"},
}


def choose(config: Config, device: torch.device) -> tuple[Config, list[str]]:
    """The config with memory.compute decided, and a line that says why. Only where it is "auto", and only in
    the layer-major engine; on a CPU only for runs that are long enough."""
    kept = config.memory
    operations = 6 * count_parameters(config.model) * config.train.total_steps * config.train.batch_tokens
    short = device.type == "cpu" and operations < WORTH_MEASURING
    if kept.compute != "auto" or kept.engine != "layerwise" or kept.kernels == "plain" or short:
        return config, []
    if forms.enable(device.type):  # without compiled kernels nothing is gained
        return config, []
    seconds = measure(config, device)
    if not seconds:
        return config, []
    best = min(seconds, key=lambda name: seconds[name])
    memory = kept.model_copy(update=CANDIDATES[best] | {"kernels": "fused"})
    slowest = max(seconds.values())
    speeds = ", ".join(f"{name} {slowest / seconds[name]:.2f}" for name in seconds)
    keys = " and ".join(f"memory.{key}={value}" for key, value in CANDIDATES[best].items())
    line = f"memory.compute=auto takes {best}, the fastest here (relative speed: {speeds}); to fix it: {keys}"
    return config.model_copy(update={"memory": memory}), [line]


def measure(config: Config, device: torch.device) -> dict[str, float]:
    """Seconds of a step of the run's model with few tokens, without updates, by candidate."""
    found: dict[str, float] = {}
    for name, keys in CANDIDATES.items():
        if not _possible(config, keys, device):
            continue
        memory = config.memory.model_copy(update=keys | {"kernels": "fused"})
        candidate = config.model_copy(update={"memory": memory})
        try:
            layer, rest = _seconds(candidate, device, 1), _seconds(candidate, device, 0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        found[name] = max(0.0, layer - rest) * config.model.n_layers + rest
    return found


def _possible(config: Config, keys: Mapping[str, str], device: torch.device) -> bool:
    if device.type == "cuda":
        # with bf16, fp32 activations are only slower
        if keys.get("activations", keys["compute"]) == "fp32":
            return torch.cuda.get_device_capability(device) < BF16 and keys["compute"] == "fp32"
        return torch.cuda.get_device_capability(device) >= BF16
    return keys["compute"] != "int8" or (config.memory.weights == "int8" and product.is_exact())


class _Still:
    """An optimizer that does nothing."""

    def update(
        self, unit: Unit, grads: Mapping[str, Tensor], step: int, schedule: float, accepted: Tensor
    ) -> None: ...


def _seconds(config: Config, device: torch.device, layers: int) -> float:
    """Median time of a step of one micro-batch through this many layers and the head."""
    model, length = config.model, config.data.seq_len
    rooms, kept = Rooms(device), config.memory
    cut = model.model_copy(update={"n_layers": layers})
    units = empty_units(cut, kept.weights, kept.embeddings_kept_in, rooms)
    # zeros take as long on a CPU, and a large embedding takes long to draw
    initialize((u for n, u in units.items() if device.type == "cuda" or n.startswith("layers")), 0, device)
    one = model.model_copy(update={"n_layers": 1})
    most = max(LEAST_TOKENS, int(MOST_FLOPS[device.type] / (8 * count_parameters(one))))
    length = min(length, most)
    sequences = max(1, min(config.batch_sequences, 2048 // length, most // length))
    settings = EngineSettings.of(config, Choice(sequences), device, adapted=False)
    settings = replace(settings, objective=None)  # these tokens are no examples
    engine = LayerwiseEngine(cut, units, _Still(), rooms, settings)
    engine.shrinks = False
    batch: Any = torch.arange(sequences * (length + 1)).view(sequences, length + 1) % model.vocab
    times: list[float] = []
    while len(times) <= REPEATS and sum(times) < ENOUGH_SECONDS:
        began = time.perf_counter()
        engine.step(batch, 0, 1.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)  # the first one also warms up
