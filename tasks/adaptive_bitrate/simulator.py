"""Chunk-level simulator of adaptive bitrate streaming, many sessions at once; numpy and numba only.

One session plays one video over one bandwidth trace. The rules are those of Pensieve (Mao et al., SIGCOMM 2017) as
NetLLM runs them; ``../shared/golden`` logs of that program are reproduced to 1e-9 by the tests.

Shapes: N sessions, L levels of the bitrate ladder, H samples of history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Observations = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Traces:
    """Bandwidth traces, one behind the other in flat arrays.

    Attributes:
        names: (M,) names.
        sources: (M,) what each trace was cut from: traces of one source are dependent.
        starts: (M + 1,) where each trace begins in the flat arrays.
        time_s: (P,) ascending within a trace.
        bandwidth_mbps: (P,) holds on the interval that ends at this sample's time.
        pointers: (M,) sample, at least 1, in whose interval a session starts in fixed mode.
    """

    names: npt.NDArray[np.str_]
    sources: npt.NDArray[np.str_]
    starts: Ints
    time_s: Floats
    bandwidth_mbps: Floats
    pointers: Ints

    def __len__(self) -> int:
        """Number of traces."""
        return len(self.names)


@dataclass(frozen=True)
class Video:
    """What is streamed.

    Attributes:
        name: What it is called.
        ladder_kbps: (L,) nominal bitrates, ascending.
        chunk_bytes: (chunks, L) sizes.
        chunk_s: Playing time of a chunk.
    """

    name: str
    ladder_kbps: Ints
    chunk_bytes: Ints
    chunk_s: float = 4.0


@dataclass(frozen=True)
class Rules:
    """How a session runs and what it is worth; the defaults are the published ones.

    Attributes:
        chunks: Chunks that are played, if the video has that many; null plays all.
        first_level: Level of the first chunk, which no policy chooses and whose reward does not count.
        buffer_limit_s: The client waits while more than this is buffered.
        drain_s: It waits in multiples of this.
        rtt_s: Added to each download, without moving the trace.
        payload: Share of the bandwidth that carries video.
        rebuffer_weight: Reward lost per second of rebuffering.
        smoothness_weight: Reward lost per Mbit/s of change in bitrate.
        noise: Range of the random factor on download times in random mode.
        scale: In random mode, standard deviation of the log of a random factor on a session's bandwidth.
    """

    chunks: int | None = 48
    first_level: int = 0
    buffer_limit_s: float = 60.0
    drain_s: float = 0.5
    rtt_s: float = 0.08
    payload: float = 0.95
    rebuffer_weight: float = 4.3
    smoothness_weight: float = 1.0
    noise: tuple[float, float] = (0.9, 1.1)
    scale: float = 0.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def download(
    time: Floats, rate_mbps: Floats, first: int, end: int, pointer: int, clock: float, size: float, payload: float
) -> tuple[float, int, float]:
    """Walk a trace until a chunk has arrived.

    Args:
        time: (P,) flat sample times, seconds.
        rate_mbps: (P,) flat bandwidths.
        first: Where the trace begins in them.
        end: Where it ends.
        pointer: Flat index of the current interval's end.
        clock: Position within the trace, seconds.
        size: Bytes.
        payload: Share of the bandwidth that carries video.

    Returns:
        Seconds it took, and the new pointer and clock.
    """
    sent, delay = 0.0, 0.0
    while True:
        rate = rate_mbps[pointer] * 1e6 / 8.0
        duration = time[pointer] - clock
        part = rate * duration * payload
        if sent + part > size:
            fraction = (size - sent) / rate / payload
            return delay + fraction, pointer, clock + fraction
        sent += part
        delay += duration
        clock = time[pointer]
        pointer += 1
        if pointer >= end:
            pointer, clock = first + 1, 0.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def idle(time: Floats, first: int, end: int, pointer: int, clock: float, sleep_ms: float) -> tuple[float, int, float]:
    """Walk a trace for a time in which nothing is downloaded.

    Returns:
        Milliseconds that were left in the last interval (what the published program reports), pointer and clock.
    """
    while True:
        duration = time[pointer] - clock
        if duration > sleep_ms / 1000.0:
            return sleep_ms, pointer, clock + sleep_ms / 1000.0
        sleep_ms -= duration * 1000.0
        clock = time[pointer]
        pointer += 1
        if pointer >= end:
            pointer, clock = first + 1, 0.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def uniform(seed: int, draw: int) -> float:
    """Number in [0, 1) that depends on a session's seed and the draw only (SplitMix64, Steele et al. 2014).

    A batch of sessions so gives the same numbers as each session alone, whatever the order.
    """
    z = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(draw + 1) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):  # one round leaves consecutive seeds correlated
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    time, rate_mbps, starts, trace, seed, pointer, clock, scale, buffer_ms, level, chunk, action, ladder, sizes,
    chunk_ms, limit_ms, drain_ms, rtt_ms, payload, rebuffer_weight, smoothness_weight, low, high,
    throughput, delay_s, out,
) -> None:  # fmt: skip
    """Download one chunk in every session; all per-session arrays change in place."""
    history = throughput.shape[1]
    for i in range(len(trace)):
        first, end = starts[trace[i]], starts[trace[i] + 1]
        size = sizes[chunk[i], action[i]]
        # Bandwidth times s is the same walk as a chunk smaller by s; s = 1 changes no digit.
        seconds, p, c = download(time, rate_mbps, first, end, pointer[i], clock[i], size / scale[i], payload)
        delay = seconds * 1000.0 + rtt_ms
        if high > low:
            delay *= low + (high - low) * uniform(seed[i], 8 + chunk[i])
        rebuffer = max(delay - buffer_ms[i], 0.0)
        buffer = max(buffer_ms[i] - delay, 0.0) + chunk_ms
        sleep = 0.0
        if buffer > limit_ms:
            sleep = np.ceil((buffer - limit_ms) / drain_ms) * drain_ms
            buffer -= sleep
            sleep, p, c = idle(time, first, end, p, c, sleep)
        pointer[i], clock[i], buffer_ms[i] = p, c, buffer
        kbps, before = ladder[action[i]], ladder[level[i]]
        change = abs(kbps - before) / 1000.0
        out[i, 0] = kbps / 1000.0 - rebuffer_weight * (rebuffer / 1000.0) - smoothness_weight * change
        out[i, 1] = rebuffer / 1000.0
        out[i, 2] = delay
        out[i, 3] = sleep
        out[i, 4] = size
        out[i, 5] = change
        for h in range(history - 1):
            throughput[i, h] = throughput[i, h + 1]
            delay_s[i, h] = delay_s[i, h + 1]
        throughput[i, history - 1] = size / delay / 1000.0
        delay_s[i, history - 1] = delay / 1000.0
        level[i] = action[i]
        chunk[i] += 1


class Simulator:
    """N sessions side by side.

    In ``fixed`` mode session number s plays trace s (modulo their number) from its start pointer, without noise. In
    ``random`` mode trace, start, noise and bandwidth factor are drawn from the session's seed alone.

    Args:
        traces: Bandwidths.
        video: What is streamed.
        rules: How, and what it is worth.
        mode: Whether anything is random.
        history: Samples of history in an observation (H).

    Attributes:
        trace: (N,) which trace each session plays.
        pointer: (N,) its place there (flat index).
        clock: (N,) its time there, seconds.
        scale: (N,) factor on its bandwidth.
        buffer_ms: (N,) video that waits to be played.
        level: (N,) level of the last chunk.
        chunk: (N,) index of the next chunk.
    """

    def __init__(
        self,
        traces: Traces,
        video: Video,
        rules: Rules | None = None,
        mode: Literal["fixed", "random"] = "fixed",
        history: int = 10,
    ) -> None:
        self.traces, self.video, self.mode, self.history = traces, video, mode, history
        self.rules = rules = rules or Rules()
        rows, levels = video.chunk_bytes.shape
        self.chunks = rows if rules.chunks is None else min(rules.chunks, rows)
        self.levels = levels
        if not 0 <= rules.first_level < levels or self.chunks < 2:
            raise ValueError(f"first_level {rules.first_level} of {levels} levels, {self.chunks} chunks (at least 2)")
        self._sizes = video.chunk_bytes.astype(np.float64)
        self._ladder = video.ladder_kbps.astype(np.float64)
        self._noise = rules.noise if mode == "random" else (1.0, 1.0)

    def reset(self, seeds: Sequence[int] | Ints) -> Observations:
        """Start one session for each seed and download the first chunk at the first level.

        Returns:
            What a policy sees: ``level`` (N,) of the last chunk, ``buffer_s`` (N,), ``throughput`` (N, H) MB/s and
            ``delay_s`` (N, H) of the last chunks, newest last and zero before the first, ``next_bytes`` (N, L),
            ``chunk`` (N,) index of the next chunk, ``chunks_left`` (N,), ``reward`` (N,) of the last chunk (0 for the
            first). Arrays belong to the caller.
        """
        self.seed = np.asarray(seeds, dtype=np.int64)
        n, traces = len(self.seed), self.traces
        if self.mode == "fixed":
            self.trace = self.seed % len(traces)
            offset = traces.pointers[self.trace]
            self.scale = np.ones(n)
        else:
            draws = np.array([[uniform(s, d) for d in range(4)] for s in self.seed]).reshape(n, 4)
            self.trace = (draws[:, 0] * len(traces)).astype(np.int64)
            lengths = np.diff(traces.starts)[self.trace]
            offset = 1 + (draws[:, 1] * (lengths - 1)).astype(np.int64)
            normal = np.sqrt(-2 * np.log1p(-draws[:, 2])) * np.cos(2 * np.pi * draws[:, 3])  # Box and Muller, 1958
            self.scale = np.exp(self.rules.scale * normal)
        self.pointer = traces.starts[self.trace] + offset
        self.clock = traces.time_s[self.pointer - 1]
        self.buffer_ms = np.zeros(n)
        self.level = np.full(n, self.rules.first_level)
        self.chunk = np.zeros(n, dtype=np.int64)
        self._throughput, self._delay = np.zeros((n, self.history)), np.zeros((n, self.history))
        observations, _, _, self.first = self.step(self.level.copy())
        observations["reward"] = np.zeros(n)
        return observations

    def step(self, levels: Ints) -> tuple[Observations, Floats, npt.NDArray[np.bool_], dict[str, npt.NDArray[Any]]]:
        """Download the next chunk of every session.

        Args:
            levels: (N,) chosen levels, 0 to L - 1.

        Returns:
            Observations as `reset` gives them; rewards (N,); whether the video is over (N,); and what happened, (N,)
            each: ``chunk``, ``bitrate`` (level), ``buffer_s`` (after), ``rebuffer_s``, ``chunk_bytes``, ``delay_ms``,
            ``sleep_ms``, ``change_mbps``.
        """
        levels = np.ascontiguousarray(levels, dtype=np.int64)
        if levels.shape != self.trace.shape or ((levels < 0) | (levels >= self.levels)).any():
            raise ValueError(f"levels must be {len(self.trace)} integers from 0 to {self.levels - 1}, not {levels}")
        if (self.chunk >= self.chunks).any():
            raise ValueError("a session is over; call reset")
        rules, t, out = self.rules, self.traces, np.empty((len(levels), 6))
        _step(
            t.time_s, t.bandwidth_mbps, t.starts, self.trace, self.seed, self.pointer, self.clock, self.scale,
            self.buffer_ms, self.level, self.chunk, levels, self._ladder, self._sizes, self.video.chunk_s * 1000.0,
            rules.buffer_limit_s * 1000.0, rules.drain_s * 1000.0, rules.rtt_s * 1000.0, rules.payload,
            rules.rebuffer_weight, rules.smoothness_weight, *self._noise, self._throughput, self._delay, out,
        )  # fmt: skip
        reward, rebuffer, delay, sleep, size, change = out.T
        info = {
            "chunk": self.chunk - 1,
            "bitrate": levels,
            "buffer_s": self.buffer_ms / 1000.0,
            "rebuffer_s": rebuffer,
            "chunk_bytes": size.astype(np.int64),
            "delay_ms": delay,
            "sleep_ms": sleep,
            "change_mbps": change,
        }
        return self._observe(reward), reward, self.chunk >= self.chunks, info

    def _observe(self, reward: Floats) -> Observations:
        rows = np.minimum(self.chunk, len(self._sizes) - 1)
        return {
            "level": self.level.copy(),
            "buffer_s": self.buffer_ms / 1000.0,
            "throughput": self._throughput.copy(),
            "delay_s": self._delay.copy(),
            "next_bytes": self.video.chunk_bytes[rows],
            "chunk": self.chunk.copy(),
            "chunks_left": self.chunks - self.chunk,
            "reward": reward,
        }
