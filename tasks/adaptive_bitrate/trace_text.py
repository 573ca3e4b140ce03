"""Text layouts of bandwidth traces, one file a trace.

* Two columns (Pensieve, NetLLM): ``<seconds> <Mbit/s>`` a line; the bandwidth holds on the interval that ends there.
* One column (Mahimahi): milliseconds, ascending, each an opportunity to deliver one packet of 1500 bytes; the last one
  ends the trace. They become the mean bandwidths of intervals of 1 s, the last interval being shorter.
"""

from pathlib import Path

import numpy as np

from netllm_pl.errors import UserError
from tasks.adaptive_bitrate.simulator import Floats, Ints

PACKET_BITS = 1500 * 8
"""What one line of a packet list delivers, by Mahimahi's manual (mm-link)."""
INTERVAL_MS = 1000
DIGITS = 9
"""Of the times of a packet list: 11 days. Times since 1970 would make a trace of 50 years."""


def read_text(path: Path) -> tuple[list[Path], list[Floats], list[Ints]]:
    """Read a text file or all files of a folder, by name; hidden files are left out.

    Returns:
        For each trace its file, its samples (P, 2) as seconds and Mbit/s, and the line of each sample (P,).

    Raises:
        UserError: There is no file, or a line is neither of the two layouts.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if tables := [file.name for file in files if file.suffix == ".parquet"]:
            raise UserError(f"{path}: is a folder with {', '.join(tables[:3])}; give the path of one Parquet file")
    if not files:
        raise UserError(f"{path}: holds no trace; expected text files of '<seconds> <Mbit/s>' or packet times")
    read = [_read_file(file) for file in files]
    return files, [samples for samples, _ in read], [lines for _, lines in read]


def packets_to_bandwidth(milliseconds: Ints) -> Floats:
    """Turn a packet list into samples (P, 2) of seconds and Mbit/s.

    Args:
        milliseconds: (K,) ascending times of deliveries, the last one above 0. As Mahimahi repeats a list at its end,
            one that is shorter than an interval is repeated until it fills one.
    """
    period = int(milliseconds[-1])
    repeats = -(-INTERVAL_MS // period) if period < INTERVAL_MS else 1
    times, counts = np.unique(milliseconds, return_counts=True)  # thousands may come in one millisecond
    times = (times + period * np.arange(repeats)[:, None]).ravel()
    edges = np.append(np.arange(0, period * repeats, INTERVAL_MS), period * repeats)
    # A delivery at an edge belongs to the interval that ends there; one at 0 to the first.
    interval = np.maximum(np.searchsorted(edges, times) - 1, 0)
    packets = np.bincount(interval, weights=np.tile(counts, repeats), minlength=len(edges) - 1)
    mbps = packets * PACKET_BITS / 1000.0 / np.diff(edges)
    return np.stack([edges / 1000.0, np.concatenate([mbps[:1], mbps])], axis=1)


def _read_file(path: Path) -> tuple[Floats, Ints]:
    try:
        words = [(number, line.split()) for number, line in enumerate(path.read_text().splitlines(), 1)]
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as text; expected a trace or a .parquet file") from error
    words = [(number, line) for number, line in words if line]
    if not words:
        raise UserError(f"{path}: is empty; expected lines of '<seconds> <Mbit/s>' or packet times")
    if len(words[0][1]) == 1:
        return _packets(path, words)
    samples = np.empty((len(words), 2))
    for row, (number, line) in enumerate(words):
        try:
            samples[row, 0], samples[row, 1] = map(float, line)
        except ValueError:
            text = " ".join(line)[:60]
            raise UserError(f"{path}, line {number}: '{text}'; expected '<seconds> <Mbit/s>'") from None
    return samples, np.array([number for number, _ in words])


def _packets(path: Path, words: list[tuple[int, list[str]]]) -> tuple[Floats, Ints]:
    times = np.zeros(len(words), dtype=np.int64)
    for row, (number, line) in enumerate(words):
        if len(line) != 1 or not line[0].isdecimal() or len(line[0]) > DIGITS:
            text = " ".join(line)[:60]
            expected = (
                "whole milliseconds, as the first line has" if row else "'<seconds> <Mbit/s>' or whole milliseconds"
            )
            raise UserError(f"{path}, line {number}: '{text}'; expected {expected}, of at most {DIGITS} digits")
        times[row] = int(line[0])
        if row and times[row] < times[row - 1]:
            raise UserError(f"{path}, line {number}: {times[row]} follows {times[row - 1]}; times must not descend")
    if times[-1] == 0:
        raise UserError(f"{path}: all packets come at 0 ms; expected a list that ends later")
    samples = packets_to_bandwidth(times)
    return samples, np.full(len(samples), words[0][0])
