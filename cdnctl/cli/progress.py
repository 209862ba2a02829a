"""How far a run has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cdnctl.cli.common import stderr

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0  # seconds between plain lines of progress at first; more in runs of hours


class Progress:
    """How far a run has come: by items, and by the amount of work that they are.

    Call it after each item; ``within`` is told how much of one large item is done.
    """

    def __init__(self, items: int, amount: float | None = None):
        self.items, self.count = items, 0
        self.amount = float(items) if amount is None else amount
        self._done = 0.0
        self._parts: dict[object, float] = {}
        self._started = time.monotonic()

    def __call__(self, amount: float = 1.0, item: object = None) -> None:
        """One item is done."""
        self.count += 1
        self._done += amount
        self._parts.pop(item, None)
        self._changed()

    def skip(self, amount: float = 1.0) -> None:
        """One item needs no work."""
        self.count += 1
        self.amount -= amount
        self._changed()

    def within(self, amount: float, item: object = None) -> None:
        """So much of an item is done. The next may begin before the end of this one is reported."""
        self._parts[item] = amount
        self._changed()

    def _changed(self) -> None:
        """For those that show it at once."""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def done(self) -> float:
        """Amount of the work that is done."""
        return self._done + sum(self._parts.values())

    @property
    def line(self) -> str:
        """How far, in words."""
        text = f"{self.count} of {self.items} done"
        if not 0 < self.done < self.amount:
            return f"{text}, {_clock(self.seconds)} so far"
        left = self.seconds * (self.amount - self.done) / self.done
        return f"{text} ({self.done / self.amount:.0%} of the work), about {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


@contextmanager
def progress(
    items: int, quiet: bool, as_json: bool = False, amount: float | None = None
) -> Iterator[Progress]:
    """A progress bar with rate and time left on a terminal. Elsewhere a plain line now and then,
    but none with ``as_json``: programs may take all that is said on standard error for trouble.

    amount: of all the work, if items are not alike.
    """
    console = stderr()
    if quiet or (as_json and not console.is_terminal):
        yield Progress(items, amount)
    elif console.is_terminal:
        with _bar(console, items, amount) as bar:
            yield bar
    else:
        state, over = Progress(items, amount), threading.Event()

        def tell() -> None:
            while not over.wait(min(max(EVERY, state.seconds / 10), 60 * EVERY)):
                print(f"cdnctl: {state.line}", file=sys.stderr, flush=True)

        # A thread, as a single step may take minutes.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield state
        finally:
            over.set()
            teller.join()


@contextmanager
def _bar(console: Console, items: int, amount: float | None) -> Iterator[Progress]:
    from rich import progress as rich

    class Bar(Progress):
        def _changed(self) -> None:
            rate = f"{self.count / max(self.seconds, 1e-9):.2g}/s"
            # A single small picture is done before a bar could be read.
            shown = items > 1 or bool(self._parts)
            bar.update(
                task,
                total=self.amount,
                completed=self.done,
                done=self.count,
                rate=rate,
                visible=shown,
            )

    with rich.Progress(
        rich.BarColumn(),
        rich.TextColumn("{task.fields[done]}/{task.fields[items]}  {task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        console=console,
        transient=True,
        # Results must not be drawn into the bar's stream when standard output goes elsewhere.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        state = Bar(items, amount)
        task = bar.add_task("", total=state.amount, done=0, items=items, rate="", visible=items > 1)
        yield state
