"""Homes in host memory, bands and lossy stashes: homes and bands change no result."""

import pytest
import torch

from lowres.config import ModelConfig
from lowres.engine import EngineSettings, LayerwiseEngine
from lowres.engine.boundaries import GROUP, Boundaries, Grouped, Plain, boundary_bytes, fields_in
from lowres.engine.layout import Layout
from lowres.meter import LiveTensors
from lowres.model import Units, empty_units, initialize
from lowres.rooms import GPU, HOST, Homes, Mover, Rooms
from tests.helpers import CPU, SMALL, Recorder, make_batch, make_config, make_optimizer, make_units

BLOCKS = ("layers.0", "layers.1", "layers.2")
EVERYTHING = Homes(frozenset((*BLOCKS, "head", "embed")), frozenset((*BLOCKS, "head", "embed")), 3, True)
HOMES = {
    "gpu": Homes(),
    "weights": Homes(weights=frozenset(BLOCKS)),
    "state": Homes(state=frozenset(("layers.1", "embed"))),
    "stash": Homes(stash=2),
    "carry": Homes(carry=True),
    "mixed": Homes(frozenset(("layers.2", "head")), frozenset(("layers.0", "layers.2")), 1, True),
    "everything": EVERYTHING,
}


def trained(homes: Homes, band: int, micro_batch: int, weights: str, name: str, tied: bool) -> list[object]:
    """Losses and every tensor after three steps and an evaluation."""
    config = make_config(memory={"weights": weights}, optim={"name": name}, model={"tie_embeddings": tied})
    rooms = Rooms(CPU)
    units = empty_units(config.model, weights, config.memory.embeddings_kept_in, rooms, homes.weights)
    optimizer = make_optimizer(config, units, rooms, homes.state)
    initialize(units.values(), 0, CPU)
    settings = EngineSettings(micro_batch, torch.float32, 50, band, homes)
    engine = LayerwiseEngine(config.model, units, optimizer, rooms, settings)
    results: list[object] = [engine.step(make_batch(seed=step), step, 1.0) for step in range(3)]
    results.append(engine.evaluate(make_batch(5, seed=9)))
    results += engine.log_probabilities(make_batch(5, seed=9))
    results.append(engine.logits(make_batch(2)[:, :20]))
    results += [tensor.clone() for unit in units.values() for tensor in unit.tensors().values()]
    for unit in units.values():
        home = HOST if unit.spec.name in homes.weights else GPU
        assert ("weights", home) in rooms.held()
    return results


@pytest.mark.parametrize(
    "weights, name, tied",
    [
        ("int8", "apollo-mini", False),
        ("fp32", "adamw", False),
        ("int8", "adamw", True),
        ("bf16", "fira", False),
    ],
)
@pytest.mark.parametrize("band", [1, 2, 3])
@pytest.mark.parametrize("homes", [key for key in HOMES if key != "gpu"])
def test_homes_and_bands_change_no_bit(homes: str, band: int, weights: str, name: str, tied: bool) -> None:
    place = HOMES[homes]
    if tied:  # a tied embedding stays on the GPU
        place = Homes(place.weights - {"embed"}, place.state - {"embed"}, place.stash, place.carry)
    wanted = trained(Homes(), 1, 2, weights, name, tied)
    found = trained(place, band, 2, weights, name, tied)
    assert len(wanted) == len(found) > 20
    for here, there in zip(found, wanted, strict=True):
        if isinstance(here, torch.Tensor):
            assert isinstance(there, torch.Tensor) and torch.equal(here, there)
        else:
            assert here == there


def peak(model: ModelConfig, homes: Homes, sequences: int, band: int = 1) -> tuple[int, int]:
    """Peak bytes in the GPU and the host room during a step with micro-batches of one sequence."""
    rooms = Rooms(CPU)
    units = empty_units(model, "int8", "bf16", rooms, homes.weights)
    config = make_config()
    optimizer = make_optimizer(config, units, rooms, homes.state)
    initialize(units.values(), 0, CPU)
    engine = LayerwiseEngine(
        model, units, optimizer, rooms, EngineSettings(1, torch.float32, 64, band, homes)
    )
    batch = make_batch(sequences, 64)
    with LiveTensors(rooms) as live:
        for step in range(2):
            engine.step(batch, step, 1.0)
    return live.peak[GPU], live.peak[HOST]


def test_gpu_memory_does_not_grow_with_the_number_of_micro_batches() -> None:
    """1, 4, 16, 64 micro-batches with stash and carry on the host; only the host's share grows."""
    model = SMALL.model_copy(update={"dim": 128, "ffn_dim": 344})
    homes = Homes(stash=3, carry=True)
    peaks = {count: peak(model, homes, count) for count in (1, 4, 16, 64)}
    assert len({gpu for gpu, _ in peaks.values()}) == 1, peaks
    assert 60 * peaks[1][1] < peaks[64][1] < 70 * peaks[1][1]


def test_gpu_memory_does_not_grow_with_depth_when_all_layers_live_on_the_host() -> None:
    found = {}
    for layers in (4, 12):
        model = SMALL.model_copy(update={"n_layers": layers})
        names = frozenset((*(f"layers.{i}" for i in range(layers)), "head", "embed"))
        found[layers] = peak(model, Homes(names, names, layers, True), 4)
    projections = 8 * 7 * 64 * 4  # what APOLLO-Mini draws for 8 more layers of 7 matrices
    norms = 8 * 8  # of the gradients of these layers
    assert found[12][0] == found[4][0] + projections + norms and found[12][1] > 2 * found[4][1]


def test_a_band_divides_the_stash() -> None:
    def stash(band: int) -> int:
        rooms = Rooms(CPU)
        units = make_units(SMALL.model_copy(update={"n_layers": 6}))
        settings = EngineSettings(2, torch.float32, band=band, homes=Homes(stash=99))
        engine = LayerwiseEngine(SMALL, units, Recorder(), rooms, settings)
        engine.reserve(8, 32, training=True)
        return rooms.held()["stash", HOST]

    assert stash(1) == 2 * stash(2) == 3 * stash(3) == 6 * 8 * 32 * 64 * 4


def test_lossless_boundaries_give_back_what_they_got() -> None:
    for homes in (Homes(), Homes(stash=2, carry=True)):
        rooms = Rooms(CPU)
        layout = Layout(SMALL, {}, EngineSettings(3, torch.float32))
        slabs = layout.boundaries(7, 16, 2, homes.stash, homes.carry)
        kept = Boundaries(
            rooms,
            Mover(CPU),
            slabs,
            encoding=Plain(torch.float32),
            dim=64,
            compute=torch.float32,
            sequences=7,
            length=16,
        )
        x, parts = torch.randn(7, 16, 64), [slice(0, 3), slice(3, 6), slice(6, 7)]
        kept.begin(7)
        for boundary in (kept.carry, *kept.stash):
            for part in parts:
                boundary.put(part, x[part])
            for part in parts:
                assert torch.equal(boundary.get(part), x[part])
                boundary.put(part, 2 * x[part])
            assert all(torch.equal(boundary.get(part), 2 * x[part]) for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_boundary_is_right_to_half_a_code_of_its_group(dtype: torch.dtype) -> None:
    """Even with channels that are a thousand times larger: they only affect their own group."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 128, generator=generator)
    x[..., 5] *= 1000
    x[0, 0] = 0
    x = x.to(dtype)
    encoding = Grouped()
    memory = torch.zeros(boundary_bytes(encoding, x.numel()), dtype=torch.uint8)
    fields = fields_in(memory, encoding, x.numel())
    encoding.encode(x, fields)
    back = encoding.decode(fields, tuple(x.shape), dtype).float()
    top = x.float().view(-1, GROUP).abs().amax(1, keepdim=True)
    error = (back - x.float()).view(-1, GROUP).abs()
    # half a code, what a bf16 scale may clip from the largest value, and the result's own rounding
    assert (error <= top * (0.5 / 127 + 2**-8 + (2**-8 if dtype == torch.bfloat16 else 0))).all()
    assert back[0, 0].eq(0).all()
    assert error.view(100, -1, GROUP)[:, 1:].mean() < 0.01  # the groups without the outlier
    x[1, 1, 1] = torch.nan
    encoding.encode(x, fields)
    assert encoding.decode(fields, tuple(x.shape), dtype)[1, 1, 1].isnan()


@pytest.mark.parametrize("exact_forward", [False, True])
def test_gradients_with_an_int8_stash_point_the_right_way(exact_forward: bool) -> None:
    found = {}
    for stash in ("auto", "bf16", "int8"):
        units: Units = make_units(SMALL)
        recorder = Recorder()
        settings = EngineSettings(3, torch.float32, stash_dtype=stash, exact_forward=exact_forward)
        engine = LayerwiseEngine(SMALL, units, recorder, Rooms(CPU), settings)
        loss = engine.step(make_batch(), 0, 1.0).loss
        found[stash] = (loss, torch.cat([g.double().flatten() for g in recorder.grads.values()]))
    for stash, least in (("bf16", 0.9999), ("int8", 0.999)):
        cosine = torch.cosine_similarity(found[stash][1], found["auto"][1], dim=0)
        assert least < float(cosine) < 1 + 1e-12
        assert not torch.equal(found[stash][1], found["auto"][1])
        assert abs(found[stash][0] - found["auto"][0]) < (1e-9 if exact_forward else 1e-3)


@pytest.mark.parametrize("master", ["none", "fp32", "bf16"])
@pytest.mark.parametrize("name", ["apollo-mini", "apollo", "adamw"])
def test_a_rehearsal_changes_nothing(name: str, master: str) -> None:
    """Both before the first step and later."""
    kept = {} if master == "none" else {"master": "host", "master_dtype": master}
    config = make_config(optim={"name": name, "weight_decay": 0.1}, memory={"weights": "int8", **kept})
    rooms = Rooms(CPU)
    units = empty_units(config.model, "int8", "fp32", rooms)
    optimizer = make_optimizer(config, units, rooms)
    initialize(units.values(), 0, CPU)
    engine = LayerwiseEngine(config.model, units, optimizer, rooms, EngineSettings(2, torch.float32))
    for step in range(2):
        before = {n: t.clone() for unit in units.values() for n, t in unit.tensors().items()}
        report = engine.step(make_batch(seed=3), step, 1.0, rehearsal=True)
        assert report.skipped == 5 and report.loss > 0
        for unit in units.values():
            for key, tensor in unit.tensors().items():
                assert torch.equal(tensor, before[key]), key
        engine.step(make_batch(), step, 1.0)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_master_copy_takes_the_updates(kind: str) -> None:
    """It equals fp32 (or bf16) weights, and the int8 weights are the copy rounded to nearest."""
    config = make_config(
        memory={"weights": "int8", "master": "host", "master_dtype": kind},
        optim={"name": "adamw", "lr": 1e-5, "weight_decay": 0.1},
    )
    plain = make_config(memory={"weights": kind}, optim={"name": "adamw", "lr": 1e-5, "weight_decay": 0.1})
    rooms = Rooms(CPU)
    units = empty_units(config.model, "int8", "bf16", rooms)
    wanted = empty_units(plain.model, kind, "bf16", rooms)
    optimizers = make_optimizer(config, units, rooms), make_optimizer(plain, wanted, rooms)
    initialize(units.values(), 0, CPU)
    initialize(wanted.values(), 0, CPU)
    unit, other = units["layers.0"], wanted["layers.0"]
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        grads = {s.name: torch.randn(s.shape, generator=generator) for s in unit.spec.tensors}
        for optimizer, some in zip(optimizers, (unit, other), strict=True):
            own = {name: grad.clone() for name, grad in grads.items()}
            optimizer.update(some, own, step, 1.0, torch.tensor(True))
    for spec in unit.spec.tensors:
        if len(spec.shape) == 2:
            master = unit.state[spec.name]["master"]
            expected = other.weights[spec.name].dense(torch.float32)
            assert torch.equal(master.float(), expected)
            kept = unit.weights[spec.name]
            scales = kept.tensors()[".scales"]
            assert ((kept.dense(torch.float32) - expected).abs() <= 0.5001 * scales).all()
