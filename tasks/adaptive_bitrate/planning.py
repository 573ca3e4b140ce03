"""Plans that see the future of a trace: action values in hindsight, and the offline optimum.

Both search the same tree: a node is a session after some chunks, its children are the levels of the next chunk. The
values drop nodes that another one of the same level beats in value, trace time and buffer, and cut the rest to a beam;
the optimum keeps every node that can still win.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from netllm_pl.kernels import njit
from tasks.adaptive_bitrate.simulator import Floats, Ints, Observations, Simulator, download, idle

VALUE, TIME, CLOCK, BUFFER = range(4)  # columns of a node: reward so far, trace time since the root, clock, buffer (ms)
LEVEL, POINTER, PARENT = range(3)
ROUNDING = 1e-9  # sums of the same rewards in another order differ by less


@njit()
def _expand(  # type: ignore[no-untyped-def]
    time, rate_mbps, first, end, scale, node, place, parent, level, sizes, ladder, rules, out, out_place
):  # fmt: skip
    """Play one chunk at a level from a node into an empty node."""
    chunk_ms, limit_ms, drain_ms, rtt_ms, payload, rebuffer_weight, smoothness_weight = rules
    clock, pointer = node[CLOCK], place[POINTER]
    seconds, pointer, clock = download(time, rate_mbps, first, end, pointer, clock, sizes[level] / scale, payload)
    delay = seconds * 1000.0 + rtt_ms
    rebuffer = max(delay - node[BUFFER], 0.0)
    buffer = max(node[BUFFER] - delay, 0.0) + chunk_ms
    if buffer > limit_ms:
        sleep = np.ceil((buffer - limit_ms) / drain_ms) * drain_ms
        buffer -= sleep
        seconds += sleep / 1000.0
        _, pointer, clock = idle(time, first, end, pointer, clock, sleep)
    change = abs(ladder[level] - ladder[place[LEVEL]]) / 1000.0
    reward = ladder[level] / 1000.0 - rebuffer_weight * (rebuffer / 1000.0) - smoothness_weight * change
    out[VALUE], out[TIME] = node[VALUE] + reward, node[TIME] + seconds
    out[CLOCK], out[BUFFER] = clock, buffer
    out_place[LEVEL], out_place[POINTER], out_place[PARENT] = level, pointer, parent


@njit()
def _prune(nodes, places, count, beam, weight, kept, kept_places):  # type: ignore[no-untyped-def]
    """Copy the best nodes that no better one dominates; return how many."""
    order = np.argsort(-(nodes[:count, VALUE] + weight * nodes[:count, BUFFER] / 1000.0))
    n = 0
    for candidate in order:
        node, place = nodes[candidate], places[candidate]
        dominated = False
        for k in range(n):
            if (
                kept_places[k, LEVEL] == place[LEVEL]
                and kept[k, VALUE] >= node[VALUE]
                and kept[k, TIME] <= node[TIME]
                and kept[k, BUFFER] >= node[BUFFER]
            ):
                dominated = True
                break
        if dominated:
            continue
        kept[n], kept_places[n] = node, place
        n += 1
        if n == beam:
            break
    return n


@njit(nogil=True)
def _values(  # type: ignore[no-untyped-def]
    time, rate_mbps, starts, trace, pointer, clock, scale, buffer_ms, level, chunk, sizes, ladder, rules, chunks,
    horizon, beam, weight, sessions, out,
):  # fmt: skip
    """Hindsight values of every level in some sessions: out (N, L)."""
    levels = sizes.shape[1]
    nodes, places = np.empty((beam * levels, 4)), np.empty((beam * levels, 3), np.int64)
    kept, kept_places = np.empty((beam, 4)), np.empty((beam, 3), np.int64)
    root, root_place = np.zeros(4), np.zeros(3, np.int64)
    for i in sessions:
        first, end = starts[trace[i]], starts[trace[i] + 1]
        root[VALUE], root[TIME], root[CLOCK], root[BUFFER] = 0.0, 0.0, clock[i], buffer_ms[i]
        root_place[LEVEL], root_place[POINTER] = level[i], pointer[i]
        last = min(chunk[i] + horizon, chunks)
        for action in range(levels):
            _expand(time, rate_mbps, first, end, scale[i], root, root_place, 0, action, sizes[chunk[i]], ladder, rules,
                    kept[0], kept_places[0])  # fmt: skip
            n = 1
            for c in range(chunk[i] + 1, last):
                count = 0
                for k in range(n):
                    for choice in range(levels):
                        _expand(time, rate_mbps, first, end, scale[i], kept[k], kept_places[k], k, choice, sizes[c],
                                ladder, rules, nodes[count], places[count])  # fmt: skip
                        count += 1
                n = _prune(nodes, places, count, beam, weight, kept, kept_places)
            # Behind the horizon a buffer is worth something, behind the video's end nothing.
            worth = weight if last < chunks else 0.0
            best = -np.inf
            for k in range(n):
                best = max(best, kept[k, VALUE] + worth * kept[k, BUFFER] / 1000.0)
            out[i, action] = best


def hindsight_values(
    simulator: Simulator, horizon: int = 12, beam: int = 60, buffer_weight: float = 0.1
) -> npt.NDArray[np.float64]:
    """Value of every level for the next chunk under the best continuation with the known future bandwidth.

    Averaged over futures (which a regression does) these values price in the risk of a level; imitating the best level
    in hindsight would not. Noise on download times is left out.

    Args:
        simulator: Sessions in progress; they are not changed.
        horizon: Chunks that are looked ahead, the next one included.
        beam: Nodes kept after each chunk.
        buffer_weight: Worth of a second of buffer at the horizon.

    Returns:
        (N, L) sums of rewards.
    """
    if (simulator.chunk >= simulator.chunks).any():
        raise ValueError("a session is over; call reset")
    out = np.empty((len(simulator.trace), simulator.levels))
    t = simulator.traces

    def value(sessions: Ints) -> None:
        _values(
            t.time_s, t.bandwidth_mbps, t.starts, simulator.trace, simulator.pointer, simulator.clock, simulator.scale,
            simulator.buffer_ms, simulator.level, simulator.chunk, simulator.sizes, simulator.ladder,
            simulator.constants, simulator.chunks, horizon, beam, buffer_weight, sessions, out,
        )  # fmt: skip

    _in_threads(value, np.array_split(np.arange(len(out)), os.cpu_count() or 1))
    return out


def _in_threads(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
    """Work on all parts with as many threads as there are cores.

    Threads of our own: numba's parallel loops go through OpenMP and would change the number of torch's threads.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(work, parts))


class Hindsight:
    """A simulator whose ``info`` also holds ``values`` (N, L): hindsight values of all levels, before each step.

    Args:
        simulator: What is played.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.first: dict[str, npt.NDArray[Any]] = {}

    def reset(self, seeds: Sequence[int] | Ints) -> Observations:
        """Start one session for each seed."""
        observations = self.simulator.reset(seeds)
        self.first = self.simulator.first
        return observations

    def step(self, actions: Ints) -> tuple[Observations, Floats, npt.NDArray[np.bool_], dict[str, npt.NDArray[Any]]]:
        """Value all levels, then download the next chunk at the chosen ones."""
        values = hindsight_values(self.simulator)
        observations, rewards, over, info = self.simulator.step(actions)
        return observations, rewards, over, info | {"values": values}


@njit()
def _front(nodes, places, count, level, weight, kept, kept_places, n):  # type: ignore[no-untyped-def]
    """Append the nodes of a level that no other one beats in value, time and quality; return how many are kept.

    Quality is the value without the price of stalls: it must not be less, since a plan that has not stalled yet may
    have to, for as long as the other one did. Up to a constant it is the value plus the weighted time at which the
    buffer runs out. Nodes come in the order of time; a Fenwick tree over the rank of their values tells the highest
    quality among the earlier ones of at least that value.
    """
    index = np.nonzero(places[:count, LEVEL] == level)[0]
    m = len(index)
    value = nodes[index, VALUE]
    quality = value + weight * (nodes[index, TIME] + nodes[index, BUFFER] / 1000.0)
    descending = np.argsort(-value)
    ranked = -value[descending]
    tree = np.full(m + 1, -np.inf)
    for k in np.argsort(nodes[index, TIME]):
        node, place, best = nodes[index[k]], np.searchsorted(ranked, -value[k] + ROUNDING, side="right"), -np.inf
        while place > 0:
            best = max(best, tree[place])
            place -= place & -place
        if best >= quality[k] - ROUNDING:
            continue
        place = np.searchsorted(ranked, -value[k], side="right")
        while place <= m:
            tree[place] = max(tree[place], quality[k])
            place += place & -place
        if n == len(kept):
            return -1
        kept[n], kept_places[n] = node, places[index[k]]
        n += 1
    return n


@njit(nogil=True)
def _plan(  # type: ignore[no-untyped-def]
    time, rate_mbps, first, end, pointer, clock, scale, buffer_ms, level, chunk, sizes, ladder, rules, chunks, limit,
    out,
):  # fmt: skip
    """Best levels of the remaining chunks of one session, into out (chunks - chunk,); False if the limit was met."""
    levels, steps = sizes.shape[1], chunks - chunk
    nodes, places = np.empty((limit * levels, 4)), np.empty((limit * levels, 3), np.int64)
    kept, kept_places = np.zeros((limit, 4)), np.zeros((limit, 3), np.int64)
    trail = np.empty((steps, limit, 2), np.int32)  # level and parent of each node that was kept
    kept[0, CLOCK], kept[0, BUFFER] = clock, buffer_ms
    kept_places[0, LEVEL], kept_places[0, POINTER] = level, pointer
    n = 1
    for step in range(steps):
        count = 0
        for k in range(n):
            for choice in range(levels):
                _expand(time, rate_mbps, first, end, scale, kept[k], kept_places[k], k, choice, sizes[chunk + step],
                        ladder, rules, nodes[count], places[count])  # fmt: skip
                count += 1
        n = 0
        for choice in range(levels):
            n = _front(nodes, places, count, choice, rules[5], kept, kept_places, n)
            if n < 0:
                return False
        trail[step, :n, 0], trail[step, :n, 1] = kept_places[:n, LEVEL], kept_places[:n, PARENT]
    best = np.argmax(kept[:n, VALUE])
    for step in range(steps - 1, -1, -1):
        out[step], best = trail[step, best, 0], trail[step, best, 1]
    return True


class OfflineOptimal:
    """Plans the whole video with the known future of each trace: the ceiling of every policy.

    Dynamic programming over chunks that keeps every plan which no other of the same level beats in reward, trace time
    and quality. It is exact but for waiting at a full buffer, where being early may be a disadvantage. Noise on
    download times is not foreseen. A session takes about a second.

    Args:
        simulator: The environment that it acts in.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    def watch(self, env: Any) -> None:
        """Act in this environment from now on: a simulator, or what labels the steps of one."""
        self.simulator = getattr(env, "simulator", env)

    def reset(self, n: int) -> None:
        """Plan n sessions that have just begun."""
        self.levels = np.empty((n, self.simulator.chunks - 1), np.int64)
        _in_threads(self._plan_session, range(n))

    def _plan_session(self, i: int) -> None:
        s, t = self.simulator, self.simulator.traces
        first, end = t.starts[s.trace[i]], t.starts[s.trace[i] + 1]
        limit = 1 << 14
        while not _plan(
            t.time_s, t.bandwidth_mbps, first, end, s.pointer[i], s.clock[i], s.scale[i], s.buffer_ms[i], s.level[i],
            s.chunk[i], s.sizes, s.ladder, s.constants, s.chunks, limit, self.levels[i],
        ):  # fmt: skip
            limit *= 4

    def act(self, observations: Observations) -> Ints:
        """Follow the plans."""
        chosen: Ints = self.levels[np.arange(len(self.levels)), observations["chunk"] - 1]
        return chosen
