"""Bandwidth traces, hand-written predictors, and windows of the traces as a data module; all in Mbit/s."""

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from netllm_pl.data import Batch, NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.evaluate import Metric
from tasks.throughput_prediction.task import HISTORY, HORIZON, INTERVAL_S, ThroughputPrediction

Traces = dict[str, NDArray[np.float64]]  # by name, the mean throughputs of equal intervals
COLUMNS = ["time_s", "bandwidth_mbps"]


def generate(traces: int = 120, intervals: int = 100) -> Traces:
    """Make links with a level that holds for a while, fading, and short outages after which the level comes back."""
    rng, size = np.random.default_rng(0), (traces, intervals)
    changed = np.maximum.accumulate(np.where(rng.random(size) < 0.04, np.arange(intervals), 0), axis=1)
    level = np.take_along_axis(np.exp(rng.normal(0.3, 0.7, size)), changed, axis=1)
    outage, long = rng.random(size) < 0.05, rng.random(size) < 0.5
    outage[:, 1:] |= (outage & long)[:, :-1]
    mbps = level * np.exp(0.1 * rng.standard_normal(size)) * np.where(outage, 0.1, 1.0)
    return {f"synthetic-{k}": row for k, row in enumerate(mbps)}


def read_traces(path: Path) -> Traces:
    """Read trace_name, time_s, bandwidth_mbps (up to that time): a Parquet file, or a folder of texts, one a trace."""
    try:
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path, columns=["trace_name", *COLUMNS])
        else:
            files = {f.name: pd.read_csv(f, sep=r"\s+", names=COLUMNS) for f in path.iterdir()}
            rows = pd.concat(files, names=["trace_name"])
        parts = {str(name): part[COLUMNS].to_numpy(np.float64).T for name, part in rows.groupby("trace_name")}
    except Exception as error:  # what is wrong in a file raises nearly anything
        raise UserError(f"{path} cannot be read as bandwidth traces (nor is it 'synthetic'): {error!r:.150}") from error
    for name, (time, mbps) in parts.items():
        if not ((mbps >= 0) & (mbps < np.inf)).all() or not (np.diff(time, prepend=-1, append=1e7) > 0).all():
            raise UserError(f"{path}, trace {name}: expected ascending seconds up to 1e7 and finite Mbit/s from 0")
        megabits = np.append(0.0, np.cumsum(mbps[1:] * np.diff(time)))
        parts[name] = np.diff(np.interp(np.arange(time[0], time[-1] + 1e-6, INTERVAL_S), time, megabits)) / INTERVAL_S
    return parts


def source_of(name: str) -> int:
    """Number what a trace was cut from: a measurement of FCC, a route of HSDPA, as its name tells; else the trace."""
    match = re.search(r"trace_\d+_|[a-z]+\.[\w-]+?-report", name)
    return zlib.crc32((match[0] if match else name).encode())


def last(batch: Batch) -> Tensor:
    """Hold the last value."""
    return batch["history"][:, -1:].expand_as(batch["future"])


def harmonic(batch: Batch) -> Tensor:
    """Hold the harmonic mean of the last five values, as MPC for video does (Yin et al., SIGCOMM 2015)."""
    return 1 / (1 / batch["history"][:, -5:].clamp_min(0.01)).mean(1, keepdim=True).expand_as(batch["future"])


def linear(train: Batch) -> Callable[[Batch], Tensor]:
    """Fit weights of the history and a constant for the least absolute error, by reweighted least squares."""
    x, y = pad(train["history"].double(), (0, 1), value=1.0), train["future"].double()
    root = torch.ones_like(y)
    for _ in range(50):
        weights = torch.linalg.lstsq(root.T[..., None] * x, (root * y).T[..., None]).solution[..., 0].T
        root = (x @ weights - y).abs().clamp_min(1e-3).rsqrt()
    return lambda batch: (pad(batch["history"].double(), (0, 1), value=1.0) @ weights).float().clamp_min(0)


class ThroughputPredictionData(NetDataModule):
    """Windows of throughput.

    Args:
        traces: ``synthetic``, or a path that `read_traces` takes.
        test_traces: Such a path for the test split, whose sources are then in no other; null deals `traces` out.
        batch_size: Windows in a training batch.
        eval_batch_size: Windows in a validation or test batch.
    """

    baselines: ClassVar[dict[str, Any]] = {"last": lambda: last, "harmonic": lambda: harmonic, "linear": linear}
    metrics = (Metric("mae_mbps", "mae_mbps"), Metric("rmse_mbps", "mse", root=True))
    compared = ("last", "harmonic", "linear")

    def __init__(
        self, traces: str = "synthetic", test_traces: str | None = None,
        batch_size: int = 64, eval_batch_size: int = 512,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, eval_batch_size)
        self.traces = generate() if traces == "synthetic" else read_traces(Path(traces))
        self.test_traces = read_traces(Path(test_traces)) if test_traces else None

    def splits(self) -> dict[str, Traces]:
        """Traces of each split: of the sources a fifth to test, a fifth to valid; no source is in two of them."""
        own, fifth = self.traces, {name: row for name, row in self.traces.items() if source_of(name) % 5 == 0}
        test = fifth if self.test_traces is None else self.test_traces
        tested = set(map(source_of, test))
        left = {name: own[name] for name in own if source_of(name) not in tested}
        valid = {name: left[name] for name in left if source_of(name) % 5 == 1}
        return {"train": {name: left[name] for name in left if name not in valid}, "valid": valid, "test": test}

    def dataset(self, split: str) -> Dataset:
        """Return the windows of a split: history (N, HISTORY), future (N, HORIZON), and the source (N,)."""
        length, traces = HISTORY + HORIZON, self.splits()[split]
        cut = {name: sliding_window_view(row, length) for name, row in traces.items() if len(row) >= length}
        source = [source_of(name) for name, rows in cut.items() for _ in rows]
        values = np.concatenate([np.empty((0, length)), *cut.values()])
        columns = {"history": values[:, :HISTORY], "future": values[:, HISTORY:], "source": source}
        return Dataset.from_dict(columns).with_format("torch")

    def policy(self, name: str, split: str = "test") -> Any:
        """Build a policy; the linear one is fitted on the training windows."""
        policy = linear(self.dataset("train")[:]) if name == "linear" else super().policy(name, split)
        if isinstance(policy, torch.nn.Module) and not isinstance(policy, ThroughputPrediction):
            raise UserError(f"{name} holds a {type(policy).__name__}, which predicts no throughput")
        return policy

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        """Run a policy over the windows of a split: one row a window, clustered by source."""
        device, parts = getattr(policy, "device", "cpu"), []
        with torch.inference_mode():
            for batch in self.loader(split):
                error = policy({name: value.to(device) for name, value in batch.items()}).cpu() - batch["future"]
                scores = {"mae_mbps": error.abs().mean(1), "mse": error.square().mean(1)}
                parts.append(pd.DataFrame({"cluster": batch["source"], **scores}))
        return pd.concat(parts, ignore_index=True).rename_axis("window").reset_index()
