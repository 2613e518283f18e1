"""The memory of a real step, with the names of the plan."""

from __future__ import annotations

from lowres.config import Config
from lowres.engine import Engine, make_engine
from lowres.memory import Plan
from lowres.meter import LiveTensors
from lowres.model import Units, empty_units, starting_with
from lowres.relora import Relora
from lowres.rooms import GPU, HOST, Homes, Rooms
from lowres.storage import FORMATS, MASTER, Unit, aligned
from tests.helpers import make_optimizer

# components that live in a phase of the step; all others stay from step to step
PHASES = ("backward", "loss", "update")
Bytes = dict[tuple[str, str], int]  # by component or phase, and room


def build(config: Config, plan: Plan, rooms: Rooms, adapted: bool) -> tuple[Units, Engine]:
    """Units and engine of a run as planned."""
    homes, kept = plan.choice.homes, config.memory
    adapters = config.relora if adapted else None
    units = empty_units(config.model, kept.weights, kept.embeddings_kept_in, rooms, homes.weights, adapters)
    updater = Relora(config.relora, make_optimizer(config, units, rooms, homes.state))
    starts = starting_with(1) if config.data.document_mask else None
    return units, make_engine(config, units, updater, rooms, plan.choice, starts)


def held(units: Units, homes: Homes, rooms: Rooms) -> Bytes:
    """Bytes in slabs by component and room."""
    others = ("weights", "optimizer state")
    found = {k: size for k, size in rooms.held().items() if size and k[0] not in others}
    for unit in units.values():
        for part, home in (("weights", homes.weights), ("state", homes.state)):
            room = HOST if unit.spec.name in home else GPU
            tensors = unit.weight_tensors() if part == "weights" else unit.tensors()
            for name, tensor in tensors.items():
                if part == "state" and name in unit.weight_tensors():
                    continue
                if part == "state":
                    component = "master copy" if name.endswith(f".{MASTER}") else "optimizer state"
                else:
                    component = component_of(unit, name)
                found[component, room] = found.get((component, room), 0) + aligned(tensor.nbytes)
    return found


def component_of(unit: Unit, tensor: str) -> str:
    """The component of the plan that a stored tensor of a weight belongs to."""
    spec = next(spec for spec in unit.spec.tensors if tensor.startswith(spec.name))
    part = FORMATS[unit.kinds[spec.name]].parts[tensor.removeprefix(spec.name)]
    if len(spec.shape) == 1:
        return f"{'biases' if spec.name.endswith('.bias') else 'norms'}: {part}"
    what = "block matrices" if "layers" in spec.name else "embedding and head"
    return f"{'adapters' if 'lora' in spec.name else what}: {part}"


def phases(live: LiveTensors, rooms: Rooms) -> Bytes:
    """Peak bytes beyond the slabs in each phase of a step."""
    on_gpu = sum(size for (_, room), size in rooms.held().items() if room == GPU)
    return {(phase, GPU): live.phases[phase] - on_gpu for phase in PHASES}


def planned(plan: Plan) -> Bytes:
    """The plan's components with the same names. Components of a phase are summed, together with the
    projections, which are small, always alive and in no slab."""
    found: Bytes = {}
    for c in plan.components:
        if c.room != "disk" and c.name != "projections":
            key = (c.phase or c.name, c.room)
            found[key] = found.get(key, 0) + c.bytes
    for phase in PHASES:
        if (phase, GPU) in found:
            found[phase, GPU] += plan.size("projections")
    return found
