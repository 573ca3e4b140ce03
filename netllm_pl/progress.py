"""Says that something takes a while: a Rich bar on a terminal, plain lines elsewhere, nothing when told to be quiet."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Rich is imported late: most commands end before anything takes a while
    from rich.console import Console
    from rich.progress import Progress

FIRST = 1.0
"""Seconds before the first plain line: what is faster needs none."""
INTERVAL = 10.0
"""Seconds between two plain lines, and before the first one of a work inside another."""

Advance = Callable[[float], None]
"""Called with how much more is done."""


class _State:
    """What is on the screen."""

    quiet = False
    bars: "Progress | None" = None
    unknown: float | None = None
    depth = 0


def set_quiet(quiet: bool) -> None:
    """Choose whether only errors and the last line of a command are printed."""
    _State.quiet = quiet


def is_quiet() -> bool:
    """Whether to print nothing; of several processes of one run only the first prints."""
    return _State.quiet or not is_first()


def is_first() -> bool:
    """Whether this is the first process of a run, on all machines, as Lightning, torchrun or SLURM say it."""
    for number in ("RANK", "SLURM_PROCID"):
        if number in os.environ:
            return os.environ[number] == "0"
    return all(os.environ.get(number, "0") == "0" for number in ("NODE_RANK", "LOCAL_RANK"))


def say(text: str) -> None:
    """Print something on standard output that a quiet command leaves out."""
    if not is_quiet():
        print(text)


def attach(bars: "Progress | None", unknown: float | None = None) -> None:
    """Draw all bars as lines of a display that is on the screen already.

    Args:
        bars: The display; None takes it away.
        unknown: What it takes for a total that nobody knows: None, or infinity if it is Lightning's.
    """
    _State.bars, _State.unknown = bars, unknown


def output() -> "Console":
    """Standard output for tables: as wide as the terminal, or wide enough for any table where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show that work of unknown length goes on while the body runs."""
    with _shown(text, None):
        yield


@contextmanager
def progress(text: str, total: float) -> Iterator[Advance]:
    """Show how much of some work is done while the body runs, and the time that is left.

    Args:
        text: What is counted, such as ``episodes``.
        total: How much there is to do.

    Yields:
        A function to call with what more is done.
    """
    with _shown(text, total) as advance:
        yield advance


class Lines:
    """Plain lines on standard error about some work: none at first, then at most one every `INTERVAL` seconds.

    Args:
        text: What is counted.
        total: How much there is to do; None or infinity if nobody knows.
        done: How much of it was done before.
    """

    def __init__(self, text: str, total: float | None, done: float = 0) -> None:
        self.text, self.total, self.done, self._before = text, total, done, done
        self._stream = sys.stderr  # this very stream, even if the body redirects it
        self._start = time.monotonic()
        self._next = self._start + (FIRST if _State.depth == 0 else INTERVAL)
        self.told = False

    @property
    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() >= self._next

    def advance(self, amount: float = 1) -> None:
        """Count, and say so if it is time."""
        self.done += amount
        if self.due:
            self.tell()

    def tell(self, more: str = "") -> None:
        """Write how much is done, in per cent too, and how long the rest will take."""
        now = time.monotonic()
        self._next, self.told = now + INTERVAL, True
        print(", ".join(filter(None, (self._amount(), self._left(now), more))), file=self._stream, flush=True)

    def write(self, more: str) -> None:
        """Write what goes on, and something more."""
        print(f"{self.text}{more}", file=self._stream, flush=True)

    def end(self) -> None:
        """Write how long it took, if there was a line before."""
        if self.told:
            took = in_words(time.monotonic() - self._start)
            self.write(f": done in {took}")

    def _amount(self) -> str:
        if not self.total or math.isinf(self.total):
            return f"{self.text}: {_number(self.done)}"
        share = 100 * min(1.0, self.done / self.total)
        return f"{self.text}: {_number(self.done)} of {_number(self.total)} ({share:.0f} %)"

    def _left(self, now: float) -> str:
        new = self.done - self._before
        if not self.total or math.isinf(self.total) or new <= 0:
            return f"{in_words(now - self._start)} so far"
        return f"{in_words((now - self._start) / new * max(0.0, self.total - self.done))} left"


def in_words(seconds: float) -> str:
    """Write a duration in s, min or h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def _shown(text: str, total: float | None) -> Iterator[Advance]:
    if is_quiet():
        yield _ignore
    elif _State.bars is not None:
        with _bar(_State.bars, text, total) as advance:
            yield advance
    else:
        from rich.console import Console

        console = Console(file=sys.stderr)
        show = _display(console, text, total) if console.is_interactive else _lines(text, total)
        with show as advance:
            yield advance


@contextmanager
def _display(console: "Console", text: str, total: float | None) -> Iterator[Advance]:
    """Open a display for this bar and those inside it."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    own = (MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*Progress.get_default_columns(), *own, console=console, transient=True) as bars:
            attach(bars)
            with _bar(bars, text, total) as advance:
                yield advance
    finally:
        attach(None)


@contextmanager
def _bar(bars: "Progress", text: str, total: float | None) -> Iterator[Advance]:
    task = bars.add_task(text, total=_State.unknown if total in (None, math.inf) else total)
    try:
        yield lambda amount: bars.advance(task, amount)
    finally:
        bars.update(task, visible=False)  # not removed: Lightning finds its own by their place among all


@contextmanager
def _lines(text: str, total: float | None) -> Iterator[Advance]:
    lines = Lines(text, total)
    _State.depth += 1
    timer = Timer(FIRST, lines.write, (" ...",)) if total is None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield lines.advance
        if timer is None:
            lines.end()
    finally:
        _State.depth -= 1
        if timer is not None:
            timer.cancel()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _ignore(amount: float) -> None:
    """Show nothing."""
