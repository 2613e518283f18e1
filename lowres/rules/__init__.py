"""Update rules: how a gradient becomes the change of a weight. One file per rule.

base       the interface
registry   what each rule tells the config, the optimizer and the docs about itself
moments    element-wise moments in fp32, bf16 or int8
limiter    the norm-growth limiter
lowrank    projections that APOLLO, GaLore and Fira share

Every other file is a rule. It registers its optimizers when it is imported, which happens here.
"""

import importlib
import pkgutil

from lowres.rules.base import Betas, Clock, Rule, State
from lowres.rules.registry import KEYS, RULES, Definition, Key, Settings

for _file in sorted(pkgutil.iter_modules(__path__), key=lambda file: file.name):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["KEYS", "RULES", "Betas", "Clock", "Definition", "Key", "Rule", "Settings", "State"]
