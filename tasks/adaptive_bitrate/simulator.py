"""Chunk-level simulator of adaptive bitrate streaming, many sessions at once; numpy and numba only.

One session plays one video over one bandwidth trace. The rules are those of Pensieve (Mao et al., SIGCOMM 2017) as
NetLLM runs them; the tests reproduce logs of that program to 1e-9.

Shapes: N sessions, L levels of the bitrate ladder, H samples of history, A chunks ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError
from netllm_pl.kernels import njit

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
        drain_s: It waits in multiples of this, at most the limit: the buffer would run dry while it waits.
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

    def __post_init__(self) -> None:
        """Refuse rules that no session can be played by.

        Raises:
            UserError: A value is out of its range.
        """
        low, high = self.noise
        for name, fits, expected in (
            ("chunks", self.chunks is None or self.chunks >= 2, "2 or more, or null"),
            ("first_level", self.first_level >= 0, "0 or more"),
            ("buffer_limit_s", 0 < self.buffer_limit_s < np.inf, "seconds above 0"),
            ("drain_s", 0 < self.drain_s <= self.buffer_limit_s, "seconds above 0, up to buffer_limit_s"),
            ("rtt_s", 0 <= self.rtt_s < np.inf, "0 or more seconds"),
            ("payload", 0 < self.payload <= 1, "a share above 0, up to 1"),
            ("rebuffer_weight", np.isfinite(self.rebuffer_weight), "a number"),
            ("smoothness_weight", np.isfinite(self.smoothness_weight), "a number"),
            ("noise", 0 < low <= high < np.inf, "two ascending factors above 0"),
            ("scale", 0 <= self.scale <= 2, "0 to 2"),
        ):
            if not fits:
                raise UserError(f"rules.{name} is {getattr(self, name)}; expected {expected}")


@njit()
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


@njit()
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


@njit()
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


@njit()
def _step(  # type: ignore[no-untyped-def]
    time, rate_mbps, starts, trace, seed, pointer, clock, scale, buffer_ms, level, chunk, action, ladder, sizes, rules,
    low, high, chunks, throughput, delay_s, real, whole, following,
) -> int:  # fmt: skip
    """Download one chunk in every session; all per-session arrays change in place.

    Returns:
        0; or, with nothing changed, 1 if a level is not on the ladder, 2 if a session is over.
    """
    for i in range(len(trace)):
        if not 0 <= action[i] < len(ladder):
            return 1
        if chunk[i] >= chunks:
            return 2
    chunk_ms, limit_ms, drain_ms, rtt_ms, payload, rebuffer_weight, smoothness_weight = rules
    history = throughput.shape[1]
    for i in range(len(trace)):
        first, end = starts[trace[i]], starts[trace[i] + 1]
        size = sizes[chunk[i], action[i]]
        # Bandwidth times s is the same walk as a chunk smaller by s; s = 1 changes no digit.
        seconds, p, c = download(time, rate_mbps, first, end, pointer[i], clock[i], size / scale[i], payload)
        delay = seconds * 1000.0 + rtt_ms
        if low != 1.0 or high != 1.0:
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
        real[0, i] = kbps / 1000.0 - rebuffer_weight * (rebuffer / 1000.0) - smoothness_weight * change
        real[1, i] = rebuffer / 1000.0
        real[2, i] = delay
        real[3, i] = sleep
        real[4, i] = change
        real[5, i] = real[6, i] = buffer / 1000.0
        for h in range(history - 1):
            throughput[i, h] = throughput[i, h + 1]
            delay_s[i, h] = delay_s[i, h + 1]
        throughput[i, history - 1] = size / delay / 1000.0
        delay_s[i, history - 1] = delay / 1000.0
        whole[0, i], whole[1, i] = chunk[i], np.int64(size)
        level[i] = action[i]
        chunk[i] += 1
        whole[2, i], whole[3, i], whole[4, i] = level[i], chunk[i], chunks - chunk[i]
        for j in range(len(ladder)):
            following[i, j] = np.int64(sizes[min(chunk[i], len(sizes) - 1), j])
    return 0


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
        lookahead: Chunks whose sizes are seen ahead, from the next one on (A); the client has them from the manifest.

    Attributes:
        trace: (N,) which trace each session plays.
        pointer: (N,) its place there (flat index).
        clock: (N,) its time there, seconds.
        scale: (N,) factor on its bandwidth.
        buffer_ms: (N,) video that waits to be played.
        sizes, ladder: the video's, as floats.
        constants: chunk length, buffer limit, waiting step, round trip (ms), payload share and reward weights.
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
        lookahead: int = 0,
    ) -> None:
        self.traces, self.video, self.mode = traces, video, mode
        self.history, self.lookahead = history, lookahead
        self.rules = rules = rules or Rules()
        rows, levels = video.chunk_bytes.shape
        self.chunks = rows if rules.chunks is None else min(rules.chunks, rows)
        self.levels = levels
        if rules.first_level >= levels:
            raise UserError(
                f"rules.first_level is {rules.first_level}; video {video.name} has levels 0 to {levels - 1}"
            )
        self.sizes = video.chunk_bytes.astype(np.float64)
        self.ladder = video.ladder_kbps.astype(np.float64)
        milliseconds = (video.chunk_s, rules.buffer_limit_s, rules.drain_s, rules.rtt_s)
        weights = (rules.payload, rules.rebuffer_weight, rules.smoothness_weight)
        self.constants = (*(1000.0 * value for value in milliseconds), *map(float, weights))
        self._noise = rules.noise if mode == "random" else (1.0, 1.0)
        padded = np.pad(self.sizes[: self.chunks] / 1e6, ((0, lookahead + 1), (0, 0)))
        self._ahead = np.stack([padded[c : c + lookahead] for c in range(self.chunks + 1)])

    def reset(self, seeds: Sequence[int] | Ints) -> Observations:
        """Start one session for each seed and download the first chunk at the first level.

        Returns:
            What a policy sees: ``level`` (N,) of the last chunk, ``buffer_s`` (N,), ``throughput`` (N, H) MB/s and
            ``delay_s`` (N, H) of the last chunks, newest last and zero before the first, ``next_bytes`` (N, L),
            ``chunk`` (N,) index of the next chunk, ``chunks_left`` (N,), ``reward`` (N,) of the last chunk (0 for the
            first); with a lookahead ``upcoming_mb`` (N, A, L) sizes of the next chunks, zero behind the end. Arrays
            belong to the caller.
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
        observations, reward, _, info = self.step(self.level.copy())
        self.first = {**info, "reward": reward, "trace": self.trace.copy()}
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
        levels, n, t = np.ascontiguousarray(levels, dtype=np.int64), len(self.trace), self.traces
        # Few large arrays, whose rows are what is returned: for a hundred sessions numpy's calls cost more than steps.
        real, whole, following = np.empty((7, n)), np.empty((5, n), np.int64), np.empty((n, self.levels), np.int64)
        wrong = 1 if levels.shape != (n,) else _step(
            t.time_s, t.bandwidth_mbps, t.starts, self.trace, self.seed, self.pointer, self.clock, self.scale,
            self.buffer_ms, self.level, self.chunk, levels, self.ladder, self.sizes, self.constants, *self._noise,
            self.chunks, self._throughput, self._delay, real, whole, following,
        )  # fmt: skip
        if wrong:
            over = "a session is over; call reset"
            raise ValueError(over if wrong == 2 else f"levels must be {n} from 0 to {self.levels - 1}, not {levels}")
        reward, rebuffer, delay, sleep, change, buffer, buffer_after = real
        played, size, level, chunk, left = whole
        observations = {
            "level": level,
            "buffer_s": buffer,
            "throughput": self._throughput.copy(),
            "delay_s": self._delay.copy(),
            "next_bytes": following,
            "chunk": chunk,
            "chunks_left": left,
            "reward": reward,
        }
        if self.lookahead:
            observations["upcoming_mb"] = self._ahead[chunk]
        info = {
            "chunk": played,
            "bitrate": levels,
            "buffer_s": buffer_after,
            "rebuffer_s": rebuffer,
            "chunk_bytes": size,
            "delay_ms": delay,
            "sleep_ms": sleep,
            "change_mbps": change,
        }
        return observations, reward, left <= 0, info

    def sample(self, observations: Observations, rng: np.random.Generator) -> Ints:
        """Draw a level (N,) for every session, all with the same probability."""
        return rng.integers(self.levels, size=len(observations["level"]))
