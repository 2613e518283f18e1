"""How fast a run is, and where the time of a step goes.

subject    a run without data: the engine of a config on random tokens
peak       the fastest matrix products of this machine
"""

from lowres.speed.subject import Subject, with_random_tokens

__all__ = ["Subject", "with_random_tokens"]
