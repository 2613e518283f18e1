"""Looks at a run again and again, as long as a process has it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from lowres.errors import UserError
from lowres.terminal import Guarded
from lowres.view import View
from lowres.view.folder import TRAINING
from lowres.watch import plain
from lowres.watch.card import cards

BUCKETS = 512


def watch(folder: Path, every: float, once: bool = False) -> None:
    """Show a run until no process has it any more, or until Ctrl-C; `once`: one look. On a terminal it takes
    the whole screen if rich is installed; otherwise it prints a line whenever something has changed. every:
    seconds. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder of a run")
    view = View(folder, BUCKETS)
    on_screen = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    try:
        with ExitStack() as stack:
            show = _screen(stack, once) if on_screen else _printer()
            show(view)
            while not once and view.state().name == TRAINING:
                time.sleep(every)
                view.refresh()
                show(view)
    except KeyboardInterrupt as error:
        if error.args:  # another signal than Ctrl-C, see `stopping.loud`
            raise


def _printer() -> Callable[[View], None]:
    """Prints a line if it is another one than before, apart from the cards."""
    before = ""

    def show(view: View) -> None:
        nonlocal before
        now = plain.line(view)
        if now != before:
            print(plain.line(view, cards()), flush=True)
        before = now

    return show


def _screen(stack: ExitStack, once: bool) -> Callable[[View], None]:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from lowres.watch.screen import frame

    # what rich writes moves the cursor, and what is in it from files is clean already
    console = Console(file=sys.stdout.stream if isinstance(sys.stdout, Guarded) else sys.stdout)
    if once:
        return lambda view: console.print(frame(view, cards(), console.width))
    last: list[RenderableType] = []

    def leave() -> None:
        """The screen of before comes back at the end, and the last frame stays on it."""
        for one in last[-1:]:
            console.print(one)

    stack.callback(leave)
    live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))

    def show(view: View) -> None:
        last[:] = [frame(view, cards(), console.width)]
        live.update(last[0], refresh=True)

    return show
