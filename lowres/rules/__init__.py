"""Update rules: how a gradient becomes the change of a weight. One file per rule.

base       the interface
registry   how a rule is made from the config
moments    element-wise moments in fp32, bf16 or int8
limiter    the norm-growth limiter
lowrank    projections that APOLLO, GaLore and Fira share

Every other file is a rule, with the function that makes it for an optimizer in `lowres.catalogue`. It is
imported here.
"""

import importlib
import pkgutil

from lowres.rules.base import Betas, Clock, Rule, State
from lowres.rules.registry import Settings, make

for _file in sorted(pkgutil.iter_modules(__path__), key=lambda file: file.name):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["Betas", "Clock", "Rule", "Settings", "State", "make"]
