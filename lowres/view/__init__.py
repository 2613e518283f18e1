"""A run for looking at: everything that its folder tells, in bounded memory, also of a run in progress.

columns  numbers of any number of records, in few buckets
history  what has happened, and samples of text, thinned out
folder   the view of a run: read once, or again and again
"""

from lowres.view.columns import Columns, Curve
from lowres.view.folder import State, View, duration, find_runs
from lowres.view.history import Sample

__all__ = ["Columns", "Curve", "Sample", "State", "View", "duration", "find_runs"]
