"""The plan: how many bytes each component of a run takes on GPU, host and disk, before any of them exists.

Slabs follow from the specifications and are exact. A component that lives only for a while (activations
inside a layer, the loss chunk) belongs to a phase of the step and is counted at its largest. The peak is
everything that stays plus the largest phase. `lowres.meter` measures the same quantities.

The plan also decides what the config leaves open: the micro-batch, the band, and what lives in host
memory. On a machine without a GPU all tensors live in one memory; the plan still says what a GPU would
need, so a run can be planned anywhere.

plan        the plan as a record: what does not fit, and the messages about it
footprint   the bytes of every component
choice      the search for what fits
"""

from lowres.engine import Choice
from lowres.memory.choice import ADAPTERS, make_plan, make_plans, plan_use
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
    "plan_use",
    "require_fit",
    "require_machine",
]
