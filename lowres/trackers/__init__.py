"""Where else the metrics of a run go: programs that draw them while it trains.

base      what a tracker is, and the registry
steps     what is told to the trackers of a run, and that none of them can hurt it
One file for each tracker.
"""

from lowres.trackers import tensorboard, trackio, wandb  # noqa: F401 - each registers itself
from lowres.trackers.base import TRACKERS, Opening, require
from lowres.trackers.steps import Trackers

__all__ = ["TRACKERS", "Opening", "Trackers", "require"]
