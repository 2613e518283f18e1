"""The plan: how many bytes each component of a run takes on GPU, host and disk, before any exists.

Slabs follow from the specifications and are exact. What lives only for a while (activations inside a
layer, the loss chunk) is counted for the moment when it is largest, and belongs to a phase of the step;
the peak is everything that stays plus the largest phase. `lowres.meter` measures the same quantities.

The plan also decides what the config leaves open: the micro-batch, the band, and what lives in host
memory. On a machine without a GPU the same tensors live in the same memory; the plan still says what
the GPU would need, so that a run can be planned anywhere.

plan        the plan as a record: what does not fit, and how that is said
footprint   the arithmetic: bytes of every component
choice      the search for what fits
"""

from lowres.engine import Choice
from lowres.memory.choice import ADAPTERS, make_plan, make_plans
from lowres.memory.plan import DISK, GIB, Crew, Plan, host_bytes, require_fit, require_machine

__all__ = [
    "ADAPTERS",
    "DISK",
    "GIB",
    "Choice",
    "Crew",
    "Plan",
    "host_bytes",
    "make_plan",
    "make_plans",
    "require_fit",
    "require_machine",
]
