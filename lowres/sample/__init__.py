"""Text from a model.

choice  how the next token is chosen
tokens  the tokens that follow some prompts, together
text    the same as text, while it is written
"""

from lowres.sample.choice import Sampling
from lowres.sample.text import END, LENGTH, STOP, Part, parts, sample, samples
from lowres.sample.tokens import Generation, reader_for, room_for

__all__ = [
    "END",
    "LENGTH",
    "STOP",
    "Generation",
    "Part",
    "Sampling",
    "parts",
    "reader_for",
    "room_for",
    "sample",
    "samples",
]
