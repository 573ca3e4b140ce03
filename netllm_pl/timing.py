"""How speed is measured: warm-up apart, repeats taken in turn, medians with the range of the repeats."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Entry = dict[str, Any]
"""Numbers of one measurement, named with their units."""


@dataclass(frozen=True)
class Work:
    """Something whose speed is measured in pieces a second.

    Attributes:
        unit: What a piece is, in the plural, such as ``steps``.
        run: Does some pieces and returns how many; it is called again and again.
        beside: Name of the work that it is compared with, measured in turn with it; null for none.
        known: Pieces a second of a program that is not here, as measured elsewhere; nothing is run then.
    """

    unit: str
    run: Callable[[], float]
    beside: str | None = None
    known: float | None = None


def known(unit: str, per_s: float) -> Work:
    """Something that is compared with, but was measured elsewhere."""
    return Work(unit, lambda: 0.0, known=per_s)


def synchronise() -> None:
    """Wait until the GPU has done what it was told; nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now(wait: bool = True) -> float:
    """Return the time in seconds, by default when the device has done what it was told."""
    if wait:
        synchronise()
    return time.perf_counter()


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call, until the device is done too."""
    start = now()
    call()
    return now() - start


def rate(rates: Sequence[float], unit: str) -> Entry:
    """Name the median of rates ``<unit>_per_s``, and their smallest and largest ``<unit>_per_s_range``."""
    return {f"{unit}_per_s": median(rates), f"{unit}_per_s_range": [min(rates), max(rates)]}


def latency(seconds: Sequence[float]) -> Entry:
    """Name the median and the 99th percentile (the smallest time that 99 % do not exceed) in milliseconds."""
    ordered = sorted(seconds)
    rank = -(-99 * len(ordered) // 100)
    return {
        "median_ms": 1000 * median(ordered),
        "p99_ms": 1000 * ordered[rank - 1],
        "measured": len(ordered),
    }


def measure(works: Mapping[str, Work], repeats: int, least_s: float) -> dict[str, Entry]:
    """Measure works in turn: a machine that slows down for a while then does so to all of them.

    Args:
        works: By name.
        repeats: Measurements of each, after a first run that does not count (it compiles and fills caches).
        least_s: A measurement runs a work until that many seconds have passed, and at least once.

    Returns:
        ``<unit>_per_s`` and its range, by name; no range of what is known.
    """
    run = {name: work for name, work in works.items() if work.known is None}
    for work in run.values():
        work.run()
    rates: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(repeats):
        for name, work in run.items():
            start, pieces, seconds = now(), 0.0, 0.0
            while not pieces or seconds < least_s:
                pieces += work.run()
                seconds = now() - start
            rates[name].append(pieces / seconds)
    return {
        name: rate(rates[name], work.unit) if work.known is None else {f"{work.unit}_per_s": work.known}
        for name, work in works.items()
    }


def ratio(entries: Mapping[str, Any], of: str, to: str) -> Entry:
    """Divide one measured number by another.

    Args:
        entries: What was measured, nested.
        of: Where the numerator stands, with dots.
        to: Where the denominator stands.

    Returns:
        ``of``, ``to`` and ``ratio``.
    """
    return {"of": of, "to": to, "ratio": look_up(entries, of) / look_up(entries, to)}


def look_up(entries: Mapping[str, Any], place: str) -> float:
    """Return the number at a place, with dots."""
    found: Any = entries
    for part in place.split("."):
        found = found[part]
    return float(found)
