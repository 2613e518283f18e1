"""How fast a run is, and where the time of a step goes.

subject  a run without data: the engine of a config on random tokens
peak     the fastest matrix products of this machine
bench    tokens per second of a config, and their share of that peak
profile  a few profiled steps of a run that goes on
trace    reads the traces of torch.profiler
kinds    what an operation, a kernel or a mark is for
shares   divides the wall time of a step into these kinds
phases   follows the phases of a step
facts    what a run notes about its machine and its work
"""

from lowres.speed.bench import Bench, bench
from lowres.speed.facts import facts
from lowres.speed.profile import Profiler, RunProfile
from lowres.speed.subject import Subject, with_random_tokens

__all__ = ["Bench", "Profiler", "RunProfile", "Subject", "bench", "facts", "with_random_tokens"]
