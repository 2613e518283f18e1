"""`lowres watch`: a run while it trains, in the terminal. It reads the run's folder and writes nothing there.

curve   numbers as a curve of dots
card    temperature and power of the graphics cards
plain   a run in one line
screen  a run on the whole terminal, with rich
follow  looks again and again
"""

from lowres.watch.follow import watch

__all__ = ["watch"]
