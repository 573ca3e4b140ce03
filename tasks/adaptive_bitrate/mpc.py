"""Model-predictive control of the bitrate: RobustMPC (Yin et al., SIGCOMM 2015), mended and as NetLLM runs it.

Shapes: N sessions, L levels, H samples of history, K chunks of horizon.
"""

import numpy as np

from netllm_pl.errors import UserError
from netllm_pl.kernels import njit
from tasks.adaptive_bitrate.simulator import Floats, Ints, Observations, Rules, Video

SLACK = 1e-9  # the bound of the search may be off by rounding, by far less than this share of its largest part


@njit()
def harmonic_means(throughput: Floats, samples: int) -> Floats:
    """Harmonic mean of the last measurements of each session.

    Args:
        throughput: (N, H) MB/s, newest last; zero where nothing was measured yet.
        samples: How many of them count.

    Returns:
        (N,) MB/s; zero where nothing was measured.
    """
    means = np.zeros(len(throughput))
    for i in range(len(throughput)):
        total, count = 0.0, 0
        for h in range(max(0, throughput.shape[1] - samples), throughput.shape[1]):
            if throughput[i, h] > 0.0:
                total += 1.0 / throughput[i, h]
                count += 1
        if count:
            means[i] = 1.0 / (total / count)
    return means


def near_first(levels: int) -> Ints:
    """For each last level, all levels by distance (L, L): good plans change little, so they are found early."""
    each = np.arange(levels)
    return np.argsort(np.abs(each[:, None] - each), axis=1, kind="stable")


@njit()
def best_first_level(
    seconds: Floats, ladder: Floats, order: Ints, buffer_s: float, level: int, length: int, chunk_s: float,
    rebuffer_weight: float, smoothness_weight: float, jump: int,
) -> int:  # fmt: skip
    """First level of the best of all plans, exactly as if each of the L^K were tried in turn, last of equals wins.

    A plan is worth ``sum(kbps) / 1000 - rebuffer_weight * stall_s - smoothness_weight * sum(|change|) / 1000``. Plans
    are walked depth first; a branch is left when even its bound is worse than the best plan so far. The bound lets
    the remaining chunks arrive as the smallest ones do (no plan stalls less) and be as good as the top level
    reached at once, or, if changes cost more than that brings, the present level (none looks better). In the order
    of the plans the last of equals is the one with the highest first level, so that is all ties need.

    Args:
        seconds: (K, L) forecast download times.
        ladder: (L,) kbit/s, ascending.
        order: (L, L) levels in the order to try them after each level, near ones first, as `near_first` gives them.
        buffer_s: Video that waits to be played.
        level: Level of the last chunk.
        length: Chunks to plan, 1 to K.
        chunk_s: Playing time of a chunk.
        rebuffer_weight: Cost of a second of stall.
        smoothness_weight: Cost of a Mbit/s of change.
        jump: Largest change of level from chunk to chunk.
    """
    levels = len(ladder)
    top = ladder[levels - 1]
    # stall[k]: buffer that chunks k.. need to arrive without a stall if each is the smallest of its row
    stall = np.zeros(length + 1)
    for k in range(length - 1, -1, -1):
        least = seconds[k].min()
        stall[k] = max(least, least - chunk_s + stall[k + 1])
    # Of each depth: how many levels were tried, and what the plan above holds.
    turn, path = np.zeros(length, np.int64), np.empty(length + 1, np.int64)
    buffer, late = np.empty(length + 1), np.zeros(length + 1)
    quality, change = np.zeros(length + 1), np.zeros(length + 1)
    path[0], buffer[0] = level, buffer_s
    best, answer, k = -np.inf, 0, 0
    while k >= 0:
        now = order[path[k], turn[k]] if turn[k] < levels else -1
        if now < 0 or abs(now - path[k]) > jump:
            k -= 1
            continue
        turn[k] += 1
        left, lag = buffer[k], late[k]
        if left < seconds[k, now]:
            lag += seconds[k, now] - left
            left = 0.0
        else:
            left -= seconds[k, now]
        left += chunk_s
        good = quality[k] + ladder[now]
        jumps = change[k] + abs(ladder[now] - ladder[path[k]])
        rest = length - 1 - k
        first = now if k == 0 else path[1]
        if rest == 0:
            value = good / 1000.0 - rebuffer_weight * lag - smoothness_weight * (jumps / 1000.0)
            if value > best or (value == best and first > answer):
                best, answer = value, first
            continue
        hope = max(rest * ladder[now], rest * top - smoothness_weight * (top - ladder[now]))
        least_lag = lag + max(0.0, stall[k + 1] - left)
        bound = (good + hope) / 1000.0 - rebuffer_weight * least_lag - smoothness_weight * (jumps / 1000.0)
        if bound + SLACK * (1.0 + rebuffer_weight * least_lag) < best:
            continue
        k += 1
        path[k], buffer[k], late[k], quality[k], change[k] = now, left, lag, good, jumps
        turn[k] = 0
    return answer


@njit()
def _decide(  # type: ignore[no-untyped-def]
    bandwidth, buffer_s, level, chunk, sizes, ladder, order, chunks, horizon, shift, chunk_s, rebuffer_weight,
    smoothness_weight, jump,
):  # fmt: skip
    """Levels (N,) for forecast bandwidths (N,) MB/s; sizes that are asked for behind the video's end are zero."""
    chosen = np.zeros(len(bandwidth), np.int64)
    seconds = np.zeros((horizon, len(ladder)))
    for i in range(len(bandwidth)):
        length = min(horizon, chunks - chunk[i])
        if length < 1 or bandwidth[i] <= 0.0:
            continue
        for k in range(length):
            row = chunk[i] + k + shift
            for now in range(len(ladder)):
                seconds[k, now] = sizes[row, now] / 1e6 / bandwidth[i] if row < len(sizes) else 0.0
        chosen[i] = best_first_level(
            seconds, ladder, order, buffer_s[i], level[i], length, chunk_s, rebuffer_weight, smoothness_weight, jump
        )
    return chosen


class RobustMPC:
    """Best plan over the next chunks under a careful forecast: harmonic mean / (1 + largest recent forecast error).

    The defaults are the method as its authors describe it. NetLLM's program differs in three ways, and its numbers
    need all of them: ``RobustMPC(video, rules, any_jump=False, right_index=False, carry=True)``.

    Args:
        video: What is streamed.
        rules: How long the video is, and what counts.
        horizon: Chunks to plan ahead (fewer near the end).
        samples: Measurements in the mean, and errors of which the largest counts.
        any_jump: Plan any change of level, not only by one.
        right_index: Read the sizes of the chunks that are planned, not of those one later.
        carry: Keep errors from one episode to the next, as the published program does: it also measures once more
            after the last chunk, and has measurements in single precision in the first episode.
    """

    def __init__(
        self,
        video: Video,
        rules: Rules,
        horizon: int = 5,
        samples: int = 5,
        any_jump: bool = True,
        right_index: bool = True,
        carry: bool = False,
    ) -> None:
        if horizon < 1 or samples < 1:
            raise UserError(f"RobustMPC: horizon {horizon} and samples {samples} must be at least 1")
        if rules.rebuffer_weight < 0 or rules.smoothness_weight < 0:
            raise UserError("RobustMPC: rebuffer_weight and smoothness_weight must not be negative")
        self.horizon, self.samples, self.sequential = horizon, samples, carry
        self.rules, self.chunk_s = rules, video.chunk_s
        self.sizes, self.ladder = video.chunk_bytes.astype(np.float64), video.ladder_kbps.astype(np.float64)
        self.order = near_first(len(self.ladder))
        self.chunks = len(self.sizes) if rules.chunks is None else min(rules.chunks, len(self.sizes))
        self.jump, self.shift = (len(self.ladder) if any_jump else 1), (0 if right_index else 1)
        self.episodes = 0

    def reset(self, n: int) -> None:
        """Begin n episodes (one at a time if errors are carried over)."""
        if self.sequential and n != 1:
            raise ValueError("a policy that carries errors over runs one episode at a time")
        if not (self.sequential and self.episodes):
            self.errors, self.forecast = np.zeros((n, self.samples)), np.zeros(n)
        self.episodes += 1

    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        bandwidth = self._predict(observations["throughput"])
        levels: Ints = _decide(
            bandwidth, observations["buffer_s"], observations["level"], observations["chunk"], self.sizes, self.ladder,
            self.order, self.chunks, self.horizon, self.shift, self.chunk_s, self.rules.rebuffer_weight,
            self.rules.smoothness_weight, self.jump,
        )  # fmt: skip
        return levels

    def finish(self, observations: Observations) -> None:
        """Measure once more if errors are carried over."""
        if self.sequential:
            self._predict(observations["throughput"])

    def _predict(self, throughput: Floats) -> Floats:
        """Note the errors of the last forecasts; forecast bandwidths (N,) MB/s."""
        if self.sequential and self.episodes == 1:
            throughput = throughput.astype(np.float32).astype(np.float64)
        newest = throughput[:, -1]
        known = (self.forecast > 0) & (newest > 0)
        error = np.divide(np.abs(self.forecast - newest), newest, out=np.zeros(len(newest)), where=known)
        self.errors = np.concatenate([self.errors[:, 1:], error[:, None]], axis=1)
        self.forecast = harmonic_means(throughput, self.samples)
        return np.asarray(self.forecast / (1 + self.errors.max(axis=1)))
