"""The rules of streaming once more, to be read: one session in plain Python, chunk by chunk.

Nothing plays with it. The tests compare the batched simulator with it number by number, the benchmark in speed.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np

from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces, Video, uniform


class PlainSession:
    """One video over one trace, with a history kept as the published program keeps its own: rolled arrays.

    The first chunk is downloaded at once, as by `Simulator.reset`.

    Args:
        traces: Bandwidths.
        trace: Which of them is played.
        video: What is streamed.
        rules: How, and what it is worth.
        noise: Factor on the download time of a chunk (its index is given).
        scale: Factor on the bandwidth.
        start: Sample, at least 1, in whose interval the session starts; null takes the trace's own.
        history: Samples of history in an observation.

    Attributes:
        observation: What a policy sees, named as by `Simulator.reset`.
        info: What happened to the last chunk, named as by `Simulator.step`.
    """

    def __init__(
        self,
        traces: Traces,
        trace: int,
        video: Video,
        rules: Rules | None = None,
        noise: Callable[[int], float] = lambda chunk: 1.0,
        scale: float = 1.0,
        start: int | None = None,
        history: int = 10,
    ) -> None:
        rows = slice(traces.starts[trace], traces.starts[trace + 1])
        self.times: list[float] = traces.time_s[rows].tolist()
        self.mbps: list[float] = [value * scale for value in traces.bandwidth_mbps[rows].tolist()]
        self.pointer = int(traces.pointers[trace] if start is None else start)
        self.clock = self.times[self.pointer - 1]
        self.sizes, self.ladder = video.chunk_bytes.tolist(), video.ladder_kbps.tolist()
        self.chunk_ms = video.chunk_s * 1000.0
        self.rules, self.noise = rules or Rules(), noise
        self.chunks = min(self.rules.chunks or len(self.sizes), len(self.sizes))
        self.chunk, self.level, self.buffer = 0, self.rules.first_level, 0.0
        self.history = np.zeros((2, history))  # throughput (MB/s) and download times (s)
        self.step(self.level)
        self.observation["reward"] = 0.0

    def _next_interval(self) -> None:
        self.clock = self.times[self.pointer]
        self.pointer += 1
        if self.pointer >= len(self.times):
            self.pointer, self.clock = 1, 0.0

    def _download(self, size: int) -> float:
        """Return milliseconds."""
        sent = seconds = 0.0
        while True:
            rate = self.mbps[self.pointer] * 1e6 / 8.0
            left = self.times[self.pointer] - self.clock
            capacity = rate * left * self.rules.payload
            if sent + capacity > size:
                part = (size - sent) / rate / self.rules.payload
                self.clock += part
                return (seconds + part) * 1000.0 + self.rules.rtt_s * 1000.0
            sent += capacity
            seconds += left
            self._next_interval()

    def _wait(self) -> float:
        """Wait until the buffer is not above the limit; return milliseconds waited in the last interval."""
        limit, drain = self.rules.buffer_limit_s * 1000.0, self.rules.drain_s * 1000.0
        if self.buffer <= limit:
            return 0.0
        sleep = ceil((self.buffer - limit) / drain) * drain
        self.buffer -= sleep
        while True:
            left = self.times[self.pointer] - self.clock
            if left > sleep / 1000.0:
                self.clock += sleep / 1000.0
                return sleep
            sleep -= left * 1000.0
            self._next_interval()

    def step(self, level: int) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        """Download the next chunk at a level; return observation, reward, whether the video is over, and info."""
        size = self.sizes[self.chunk][level]
        delay = self._download(size) * self.noise(self.chunk)
        rebuffer = max(delay - self.buffer, 0.0)
        self.buffer = max(self.buffer - delay, 0.0) + self.chunk_ms
        sleep = self._wait()
        change = abs(self.ladder[level] - self.ladder[self.level]) / 1000.0
        reward = self.ladder[level] / 1000.0 - self.rules.rebuffer_weight * rebuffer / 1000.0
        reward -= self.rules.smoothness_weight * change
        self.history = np.roll(self.history, -1, axis=1)
        self.history[:, -1] = size / delay / 1000.0, delay / 1000.0
        self.level = level
        self.info = {
            "chunk": self.chunk,
            "bitrate": level,
            "buffer_s": self.buffer / 1000.0,
            "rebuffer_s": rebuffer / 1000.0,
            "chunk_bytes": size,
            "delay_ms": delay,
            "sleep_ms": sleep,
            "change_mbps": change,
        }
        self.chunk += 1
        self.observation = {
            "level": level,
            "buffer_s": self.buffer / 1000.0,
            "throughput": self.history[0],
            "delay_s": self.history[1],
            "next_bytes": np.array(self.sizes[min(self.chunk, len(self.sizes) - 1)]),
            "chunk": self.chunk,
            "chunks_left": self.chunks - self.chunk,
            "reward": reward,
        }
        return self.observation, reward, self.chunk >= self.chunks, self.info


def plain_session(simulator: Simulator, seed: int) -> PlainSession:
    """Build the plain session that a simulator's session must equal; its random numbers are taken from there."""
    simulator.reset([seed])
    trace = int(simulator.trace[0])
    if simulator.mode == "fixed":
        return PlainSession(simulator.traces, trace, simulator.video, simulator.rules, history=simulator.history)
    length = int(np.diff(simulator.traces.starts)[trace])
    pointer = 1 + int(uniform(seed, 1) * (length - 1))
    low, high = simulator.rules.noise

    def noise(chunk: int) -> float:
        return low + (high - low) * float(uniform(seed, 8 + chunk))

    return PlainSession(
        simulator.traces, trace, simulator.video, simulator.rules, noise, float(simulator.scale[0]), pointer,
        simulator.history,
    )  # fmt: skip
