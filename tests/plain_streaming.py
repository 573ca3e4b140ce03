"""The rules of streaming once more, one session in plain Python: what the batched simulator is compared with.

``python -m tests.plain_streaming`` measures the speed of both on one core, side by side, in processor time, so that
a busy machine changes little.
"""

import time
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np

from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces, Video, uniform
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.videos import generated_video


class PlainSession:
    """One video over one trace, with a history kept as the published program keeps its own: rolled arrays."""

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
        self.times = traces.time_s[rows].tolist()
        self.mbps = [value * scale for value in traces.bandwidth_mbps[rows].tolist()]
        self.pointer = int(traces.pointers[trace] if start is None else start)
        self.clock = self.times[self.pointer - 1]
        self.sizes, self.ladder = video.chunk_bytes.tolist(), video.ladder_kbps.tolist()
        self.chunk_ms = video.chunk_s * 1000.0
        self.rules, self.noise = rules or Rules(), noise
        self.chunks = min(self.rules.chunks or len(self.sizes), len(self.sizes))
        self.chunk, self.level, self.buffer = 0, self.rules.first_level, 0.0
        self.history = np.zeros((2, history))
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
        return low + (high - low) * uniform(seed, 8 + chunk)

    return PlainSession(
        simulator.traces, trace, simulator.video, simulator.rules, noise, float(simulator.scale[0]), pointer,
        simulator.history,
    )  # fmt: skip


def _batched_rate(simulator: Simulator, sessions: int) -> float:
    """Steps a second of all sessions together, the best of five runs."""
    levels = np.random.default_rng(0).integers(0, simulator.levels, (simulator.chunks - 1, sessions))
    seeds, best = np.arange(sessions), np.inf
    for _ in range(6):  # the first one compiles
        start, steps = time.process_time(), 0
        while steps < 500_000:
            simulator.reset(seeds)
            for row in levels:
                simulator.step(row)
            steps += levels.size
        best = min(best, (time.process_time() - start) / steps)
    return 1 / best


def _plain_rate(simulator: Simulator) -> float:
    levels = np.random.default_rng(0).integers(0, simulator.levels, (100, simulator.chunks - 1)).tolist()
    best = np.inf
    for _ in range(5):
        start = time.process_time()
        for trace, row in enumerate(levels):
            session = PlainSession(simulator.traces, trace, simulator.video)
            for level in row:
                session.step(level)
        best = min(best, (time.process_time() - start) / np.size(levels))
    return 1 / best


if __name__ == "__main__":
    sim = Simulator(generate(SyntheticTraces(traces=100), "test"), generated_video())
    plain = _plain_rate(sim)
    print(f"plain Python      {plain:12,.0f} steps/s")
    for n in (1, 100, 1000):
        rate = _batched_rate(sim, n)
        print(f"batched, N = {n:<5d}{rate:12,.0f} steps/s  {rate / plain:6.0f} x")
