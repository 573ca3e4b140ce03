"""Streams decisions, one session after the other, and fails if memory or the time of a decision grows.

``python tests/soak.py --seconds 3600 --out soak.csv`` prints a line a minute and ends with status 1 at growth. The time
of a decision is wall time, and that of the processor, which a busy machine changes less and on which growth is judged.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from netllm_pl.backbone import BackboneConfig
from netllm_pl.machine import private_memory_gb
from netllm_pl.rollout import Array, Observations, Policy, rollout
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.job_scheduling import JobScheduling, JobSchedulingData
from tasks.job_scheduling.simulator import Rules
from tasks.job_scheduling.synthetic import SyntheticWorkload

MEMORY = (0.02, 4.0)
"""Growth of memory from the first to the last quarter of the lines that is none: a share, and MB beside it."""
LATENCY = 0.25
"""Growth of a decision's time that is none: a share."""


class Line(NamedTuple):
    """What happened in a minute, or what is taken for one.

    Attributes:
        seconds: Since the beginning.
        task: Whose decisions.
        sessions: That have ended since the beginning.
        decisions: In this time.
        memory_mb: Private memory at its end.
        median_ms: Wall time of a decision.
        p99_ms: Of which one decision in a hundred takes more.
        cpu_p10_ms: Processor time that nine of ten decisions exceed.
    """

    seconds: float
    task: str
    sessions: int
    decisions: int
    memory_mb: float
    median_ms: float
    p99_ms: float
    cpu_p10_ms: float


class Clocked:
    """A policy whose decisions are timed."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.reset = policy.reset
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def act(self, observations: Observations) -> Array:
        """Return the policy's actions (1,)."""
        wall, cpu = time.perf_counter(), time.thread_time()
        actions = self.policy.act(observations)
        self.cpu.append(time.thread_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return actions


def streams(backbone: BackboneConfig) -> dict[str, tuple[Any, Policy]]:
    """Make a simulator and a model of each task that acts, by name of the task."""
    torch.manual_seed(0)
    streaming = AdaptiveBitrateData(synthetic=SyntheticTraces(traces=8, duration_s=120), experience=None)
    jobs = JobSchedulingData(
        synthetic=SyntheticWorkload(queries=6, sizes=("2g", "5g")), rules=Rules(jobs=10, executors=10), experience=None
    )
    return {
        "adaptive_bitrate": (streaming.simulator("test", "random"), AdaptiveBitrate(backbone).eval().as_policy()),
        "job_scheduling": (jobs.simulator("test", "random"), JobScheduling(backbone).eval().as_policy()),
    }


def soak(seconds: float, every: float, backbone: BackboneConfig) -> Iterator[Line]:
    """Stream sessions of the tasks in turn, and tell of each task every so many seconds."""
    pairs = streams(backbone)
    for env, policy in pairs.values():
        rollout(env, policy, [0])  # compiles and plans: not what lasts
    begin = time.monotonic()
    clocked = {name: Clocked(policy) for name, (_, policy) in pairs.items()}
    due, number = begin + every, 0
    for number in count(1):
        for name, (env, _) in pairs.items():
            rollout(env, clocked[name], [number])
        now = time.monotonic()
        if now >= due:
            memory = 1000 * private_memory_gb()
            for name, policy in clocked.items():
                wall, cpu = 1000 * np.asarray(policy.wall), 1000 * np.asarray(policy.cpu)
                times = (np.median(wall), np.quantile(wall, 0.99), np.quantile(cpu, 0.1))
                yield Line(now - begin, name, number, len(wall), memory, *map(float, times))
                policy.wall.clear()
                policy.cpu.clear()
            due += every
        if now - begin >= seconds:
            return


def growth(lines: list[Line]) -> list[str]:
    """Say what grew from the first quarter of the lines to the last one; the very first line of a task is left out."""
    found: list[str] = []
    for task in dict.fromkeys(line.task for line in lines):
        own = [line for line in lines if line.task == task][1:]
        quarter = max(1, len(own) // 4)
        for name, share, more in (("memory_mb", *MEMORY), ("cpu_p10_ms", LATENCY, 0.0)):
            values = [getattr(line, name) for line in own]
            first, last = (float(np.median(part)) for part in (values[:quarter], values[-quarter:]))
            if last > first * (1 + share) + more:
                found.append(f"{task}: {name} grew from {first:.3f} to {last:.3f}")
    return found


def main(args: list[str] | None = None) -> None:
    """Soak, print, write, and exit with 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds of a line")
    parser.add_argument("--smollm2", action="store_true", help="two layers of SmolLM2-135M, not two tiny random ones")
    parser.add_argument("--out", type=Path, help="CSV file to write, line by line")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    backbone = BackboneConfig(name="smollm2-135m", layers=2) if options.smollm2 else tiny_backbone()
    lines: list[Line] = []
    rows: list[tuple[str, ...]] = [Line._fields]
    for line in soak(options.seconds, options.every, backbone):
        lines.append(line)
        rows.append(tuple(f"{value:.3f}" if isinstance(value, float) else str(value) for value in line))
        print(*(f"{name} {value}" for name, value in zip(Line._fields, rows[-1], strict=True)), sep=", ", flush=True)
        if options.out is not None:
            with options.out.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
    found = growth(lines)
    print(*found or ["nothing grew"], sep="\n")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
