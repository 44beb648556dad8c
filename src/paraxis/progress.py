"""What is being done, said on standard error while it is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from paraxis.session import Tell

err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Tell]:
    """What is being done, on standard error: one line that changes on a terminal, a line a phase elsewhere."""
    start, last = time.monotonic(), [""]

    def on_terminal(what: str, fraction: float) -> None:
        if fraction == -2:
            err.print(what)
            return
        spent = time.monotonic() - start
        left = f", about {spent / fraction - spent:.0f} s left" if 0.05 < fraction <= 1 else ""
        status.update(f"{escape(what)} [dim]({spent:.0f} s{left})[/dim]")

    def on_pipe(what: str, fraction: float) -> None:
        phase = what.split(",")[0] if fraction != -2 else what
        if phase != last[0]:
            last[0] = phase
            err.print(f"{time.monotonic() - start:5.1f} s  {phase}", markup=False)

    if not err.is_terminal:
        yield on_pipe
        return
    with err.status("starting") as status:
        yield on_terminal
