"""What sessions look like: one session of several policies in one picture, and the distribution of QoE."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from netllm_pl.drawing import blank, distribution, lines
from tasks.adaptive_bitrate.simulator import Floats, Simulator, Traces


def draw_session(steps: Mapping[str, pd.DataFrame], env: Simulator) -> Figure:
    """Draw bandwidth, chosen bitrates, buffers and stalls of one session over time: the one that stalls baselines most.

    Args:
        steps: One row a chunk by name of the policy (``steps`` of `AdaptiveBitrateData.report`), of the same sessions.
        env: What they were played in. In random mode the bandwidth is the throughput that the first policy measured.
    """
    chosen = _most_stalled(list(steps.values()), env)
    tables = {name: table.iloc[chosen * env.chunks : (chosen + 1) * env.chunks] for name, table in steps.items()}
    times = {name: downloads(table, env) for name, table in tables.items()}
    figure, (rates, buffers, stalls) = blank(3, size=(8.0, 6.4), sharex=True, height_ratios=[3, 2, 1])
    first = next(iter(tables))
    trace = int(tables[first]["trace"].iloc[0])
    if env.mode == "fixed":
        edges, mbps = bandwidth(env.traces, trace, max(ends[-1] for _, ends, _ in times.values()))
    else:
        edges = np.append(0.0, times[first][1])
        mbps = tables[first]["chunk_bytes"].to_numpy() * 8 / 1000 / tables[first]["delay_ms"].to_numpy()
    rates.stairs(mbps, edges, color="lightgrey", fill=True, label="bandwidth")
    for row, (name, line) in enumerate(lines(tables).items()):
        table, (starts, ends, waits) = tables[name], times[name]
        level = env.ladder[table["bitrate"].to_numpy()] / 1000
        qoe = table["reward"].to_numpy()[1:].mean()
        rates.step(starts, level, where="post", **line, label=f"{name} (QoE {qoe:.2f})")
        buffers.plot(ends + waits, table["buffer_s"], **line)
        rebuffer = table["rebuffer_s"].to_numpy()
        stalls.broken_barh(
            [(end - stall, stall) for end, stall in zip(ends, rebuffer, strict=True) if stall > 0],
            (row - 0.4, 0.8), **line,
        )  # fmt: skip
    rates.set(ylabel="Mbit/s", ylim=(0, 1.3 * max(env.ladder[-1] / 1000, float(np.percentile(mbps, 75)))))
    rates.legend(fontsize=8, loc="upper right", ncols=2)
    buffers.set(ylabel="buffer, s", ylim=(0, None))
    stalls.set(xlabel="seconds", ylim=(len(tables) - 0.5, -0.5))
    stalls.set_yticks(range(len(tables)), list(tables), fontsize=8)
    stalls.set_ylabel("stalls")
    rates.set_title(f"Validation session {chosen} on trace {env.traces.names[trace]}", fontsize=10)
    for axes in (rates, buffers, stalls):
        axes.grid(alpha=0.3)
    return figure


def draw_qoe(episodes: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how the mean reward of a chunk is distributed over sessions.

    Args:
        episodes: One row a session by name of the policy.
    """
    figure, (axes,) = blank()
    distribution(axes, {name: table["qoe"].to_numpy() for name, table in episodes.items()}, "QoE, mean of a session")
    axes.set_title(f"QoE of {len(next(iter(episodes.values())))} validation sessions", fontsize=10)
    return figure


def downloads(table: pd.DataFrame, env: Simulator) -> tuple[Floats, Floats, Floats]:
    """Say when the chunks of a session came, (chunks,) each.

    The clock is that of the trace, which the round-trip time does not move; the wait behind a chunk is told by the
    buffers, as the simulator tells only the part of it in the last interval of the trace.

    Returns:
        Seconds at which each download begins and ends, and how long the client waits behind it.
    """
    chunk_s, rtt_s = env.constants[0] / 1000, env.constants[3] / 1000
    delay, buffer = table["delay_ms"].to_numpy() / 1000, table["buffer_s"].to_numpy()
    before = np.append(0.0, buffer[:-1])
    waits = np.maximum(before - delay, 0.0) + chunk_s - buffer
    took = delay - rtt_s
    starts = np.append(0.0, np.cumsum(took + waits)[:-1])
    return starts, starts + took, waits


def bandwidth(traces: Traces, trace: int, seconds: float) -> tuple[Floats, Floats]:
    """Return the bandwidth that a session in fixed mode has: edges (K + 1,) in seconds from 0, and (K,) Mbit/s.

    Args:
        traces: All traces.
        trace: Number of the session's.
        seconds: How far; a trace that ends before begins again.
    """
    first, end = traces.starts[trace], traces.starts[trace + 1]
    time, rate = traces.time_s[first:end], traces.bandwidth_mbps[first:end]
    start = int(traces.pointers[trace])
    spans, rates = [np.diff(time)[start - 1 :]], [rate[start:]]
    again = np.append(time[1], np.diff(time)[1:])  # from 0 on, as the simulator begins again
    for _ in range(int(np.ceil(seconds / again.sum()))):
        spans.append(again)
        rates.append(rate[1:])
    edges = np.append(0.0, np.cumsum(np.concatenate(spans)))
    count = min(int(np.searchsorted(edges, seconds)), len(edges) - 1)
    return np.minimum(edges[: count + 1], seconds), np.concatenate(rates)[:count]


def _most_stalled(tables: list[pd.DataFrame], env: Simulator) -> int:
    """Number of the session with the most rebuffering of all policies but the first, or of that one if it is alone."""
    stalls = [table["rebuffer_s"].to_numpy().reshape(-1, env.chunks).sum(1) for table in tables[1:] or tables]
    return int(np.sum(stalls, axis=0).argmax())
