"""Optimizers: `Optimizer` for the engines of lowres, and the same rules as `torch.optim.Optimizer` classes.

optimizer    which rule updates which tensor of a run, and the optimizer state
schedule     the learning rate during the run
overview     rule, learning rate and state of every tensor, as a table
torch_optim  AdamMini, Apollo, ApolloMini, Fira, GaLore, Muon, Scale, ..., for any model and training loop
"""

from typing import Any

from lowres.optim import torch_optim
from lowres.optim.optimizer import Group, Optimizer, make_optimizer, make_rule
from lowres.optim.torch_optim import AdamMini
from lowres.rules import Clock, Rule, moments

__all__ = ["AdamMini", "Clock", "Group", "Optimizer", "Rule", "make_optimizer", "make_rule", "moments"]
__all__ += list(torch_optim.CLASSES)


def __getattr__(name: str) -> Any:
    """The `torch.optim` classes of the registered rules."""
    if name in torch_optim.CLASSES:
        return torch_optim.CLASSES[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")
