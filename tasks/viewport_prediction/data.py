"""Viewport traces as a data module: published splits and windows, any trace by path, or the built-in generator."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch

from netllm_pl.data import Batch, NetDataModule
from netllm_pl.errors import UserError, at_least, unknown
from netllm_pl.evaluate import Metric
from netllm_pl.frozen import SEEN, predict
from netllm_pl.paths import data_root
from netllm_pl.progress import progress
from netllm_pl.task import NetTask
from netllm_pl.timing import now
from tasks.viewport_prediction.baselines import LinearRegression, Ridge, Static, Velocity, window_errors
from tasks.viewport_prediction.model import ViewportModel, wrap
from tasks.viewport_prediction.pictures import Pictures, read_pictures
from tasks.viewport_prediction.splits import PUBLISHED_SPLITS, check_splits
from tasks.viewport_prediction.synthetic import Synthetic, generate, synthetic_splits
from tasks.viewport_prediction.traces import Traces, read_traces
from tasks.viewport_prediction.windows import Windows, disturbed, gather, make_windows, some_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Splits = dict[str, dict[str, list[int | str]]]
WATCHED = 64
"""Windows that figures show."""


class ViewportDataset:
    """Windows of one split, gathered a batch at a time.

    Args:
        traces: All traces.
        windows: Where each window lies.
        history: Samples before.
        horizon: Samples after.
        pictures: What the videos show, or None.
        offsets: Times of the pictures relative to the last history sample, in seconds.
    """

    def __init__(
        self,
        traces: Traces,
        windows: Windows,
        history: int,
        horizon: int,
        pictures: Pictures | None = None,
        offsets: tuple[float, ...] = (0.0,),
    ) -> None:
        self.traces, self.windows = traces, windows
        self.history, self.horizon = history, horizon
        self.pictures, self.offsets = pictures, offsets

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows.t)

    def __getitem__(self, indices: list[int]) -> Batch:
        """Gather windows: history (B,T,3), future (B,H,3) degrees, window (B,), and pictures if there are any."""
        rows = np.asarray(indices, dtype=np.int64)
        history, future = gather(self.traces, self.windows, rows, self.history, self.horizon)
        batch = {
            "history": torch.from_numpy(history),
            "future": torch.from_numpy(future),
            "window": torch.from_numpy(rows),
        }
        if self.pictures is not None:
            trace = self.windows.trace[rows]
            now = self.traces.times[self.traces.starts[trace] + self.windows.t[rows] - 1]
            shown = self.pictures.at(self.traces.video[trace], now[:, None] + np.asarray(self.offsets)[None])
            batch["pictures"] = torch.from_numpy(self.pictures.pixels[shown])
            batch["picture_ids"] = torch.from_numpy(self.pictures.ids[shown])
        return batch

    def identify(self, indices: list[int]) -> dict[str, np.ndarray]:
        """Say which windows they are: window, video, user, and t, the first sample to predict; (B,) each."""
        rows = np.asarray(indices, dtype=np.int64)
        trace = self.windows.trace[rows]
        about = {"video": self.traces.video[trace], "user": self.traces.user[trace], "t": self.windows.t[rows]}
        return {"window": rows, **about}


class ViewportPredictionData(NetDataModule):
    """Viewport windows.

    Args:
        dataset: ``synthetic`` (generated), ``jin2022``, ``wu2017``, or the path of a Parquet file with columns video,
            user, t, roll, pitch, yaw (degrees), of a folder of such files, or of the published per-user CSV layout.
        data_dir: Folder with viewport/jin2022.parquet and so on; else NETLLM_DATA, else where `fetch` puts it.
        history: Samples before the prediction (5 Hz: 10 samples are 2 s).
        horizon: Samples to predict.
        step: Samples between two windows of validation and test.
        train_step: The same in training; a small number gives dense windows.
        trim_head: Samples at the start of a trace before the first predicted one.
        trim_tail: The first predicted sample lies at least that many before the end (published: 60 or 30).
        splits: For each of train, valid, test the videos and users; needed for data given by path.
        pictures: Folder of pictures <video>/<seconds>.png; the generator makes its own.
        picture_offsets: Which pictures a window sees, in seconds relative to its last history sample.
        synthetic: The generator's settings.
        share: Share of the training traces that is used, drawn by their names alone.
        noise_deg: Standard deviation of noise on each angle of the histories that `evaluate` shows.
        missing: Share of the samples of these histories that are lost: the one before is held.
        timed: Let `evaluate` tell how long a prediction takes: column ``ms``, of a window, the same in all of a batch.
        batch_size: Windows in a training batch, per process.
        eval_batch_size: Windows in a validation or test batch.
        num_workers: Loader processes.
        seed: Seed of the training order.
    """

    baselines: ClassVar[dict[str, Any]] = {
        "static": Static,
        "linear": LinearRegression,
        "velocity": Velocity,
        "ridge": Ridge,
    }
    metrics = (
        Metric("mae_deg", "mae_deg"),
        Metric("mae_roll_deg", "mae_roll_deg"),
        Metric("mae_pitch_deg", "mae_pitch_deg"),
        Metric("mae_yaw_deg", "mae_yaw_deg"),
        Metric("rmse_deg", "mse_deg2", root=True),
    )
    compared = ("static", "ridge")

    def __init__(
        self,
        dataset: str = "synthetic",
        data_dir: str | None = None,
        history: int = 10,
        horizon: int = 20,
        step: int = 15,
        train_step: int = 2,
        trim_head: int = 30,
        trim_tail: int = 60,
        splits: Splits | None = None,
        pictures: str | None = None,
        picture_offsets: tuple[float, ...] = (0.0,),
        synthetic: Synthetic = Synthetic(),  # noqa: B008  # frozen
        share: float = 1.0,
        noise_deg: float = 0.0,
        missing: float = 0.0,
        timed: bool = False,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        at_least(1, "data.", history=history, horizon=horizon, step=step, train_step=train_step)
        if not 0 < share <= 1 or not 0 <= missing < 1 or noise_deg < 0:
            raise UserError(
                f"data.share is {share} (above 0, up to 1), data.missing {missing} (from 0 to below 1), data.noise_deg "
                f"{noise_deg} (0 or above)"
            )
        self.train_share, self.noise_deg, self.missing, self.timed = share, noise_deg, missing, timed
        self.source, self.data_dir, self.own_splits = dataset, data_dir, splits
        self.history, self.horizon = history, horizon
        self.step, self.train_step = step, train_step
        self.trim_head, self.trim_tail = trim_head, trim_tail
        self.picture_folder, self.picture_offsets, self.synthetic = pictures, tuple(picture_offsets), synthetic
        if dataset != "synthetic":  # tell at once what is not there, before a model is built
            self._path(), self._splits()

    @cached_property
    def content(self) -> tuple[Traces, Pictures | None, Splits]:
        """Traces, pictures and splits, read once."""
        if self.source == "synthetic":
            traces, pixels, seconds = generate(self.synthetic)
            splits = self.own_splits or synthetic_splits(self.synthetic)
            return traces, Pictures.regular(pixels, seconds), splits
        pictures = None if self.picture_folder is None else read_pictures(Path(self.picture_folder))
        return read_traces(self._path()), pictures, self._splits()

    def _path(self) -> Path:
        if self.source in PUBLISHED_SPLITS:
            path = data_root(self.data_dir) / "viewport" / f"{self.source}.parquet"
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist; run `python -m netllm_pl fetch {self.source}`, or set data.data_dir or "
                    "NETLLM_DATA to the folder that holds viewport/"
                )
            return path
        path = Path(self.source).expanduser()
        if not path.exists():
            known = ["synthetic", *PUBLISHED_SPLITS]
            raise unknown("dataset", self.source, known, "The path of a file or folder is one too.")
        return path

    def _splits(self) -> Splits:
        published: Mapping[str, Any] = PUBLISHED_SPLITS  # a list of numbers is no list of numbers or labels
        splits: Splits | None = self.own_splits or published.get(self.source)
        if splits is None:
            raise UserError(
                f"data.splits is missing for {self.source}; say which videos and users are for what, such as "
                "splits: {test: {videos: [1], users: [2, 3]}}"
            )
        check_splits(splits)
        return splits

    def dataset(self, split: str, step: int | None = None) -> ViewportDataset:
        """Return the windows of a split; training takes its own step unless one is given."""
        traces, pictures, splits = self.content
        if split not in splits:
            raise UserError(f"split '{split}' is not among data.splits ({', '.join(splits)}); add its videos and users")
        chosen = splits[split]
        windows = make_windows(
            traces,
            chosen.get("videos"),
            chosen.get("users"),
            self.history,
            self.horizon,
            step or (self.train_step if split == "train" else self.step),
            self.trim_head,
            self.trim_tail,
            split,
        )
        if split == "train" and self.train_share < 1:
            windows = some_of(windows, traces, self.train_share)
        return ViewportDataset(traces, windows, self.history, self.horizon, pictures, self.picture_offsets)

    def policy(self, name: str, split: str = "test") -> Any:
        """Build a policy; a baseline that learns is fitted on the training windows at the published step."""
        policy = super().policy(name, split)
        if hasattr(policy, "fit") and not isinstance(policy, NetTask):
            train = self.dataset("train", step=self.step)
            rows = np.arange(len(train))
            policy.fit(*gather(train.traces, train.windows, rows, self.history, self.horizon))
        return policy

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        """Run a policy over the windows of a split: one row a window, clustered by trace (video and user)."""
        return pd.concat([frame for _, frame in self._batches(policy, split)], ignore_index=True)

    def fingerprint(self, split: str) -> str:
        """Hash of the traces."""
        traces = self.content[0]
        digest = hashlib.sha256(repr((traces.video.tolist(), traces.user.tolist())).encode())
        for array in (traces.angles, traces.times, traces.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def batches(self) -> int:
        """Batches of test windows."""
        return -(-len(self.dataset("test")) // self.eval_batch_size)

    def batch_tables(
        self, policy: Any, steps: bool = False, batches: range | None = None
    ) -> Iterator[tuple[int, dict[str, pd.DataFrame]]]:
        """Run a policy over batches of test windows."""
        if steps:
            self.tables(policy, steps)  # which refuses it
        for done, frame in self._batches(policy, "test", batches):
            yield done, {"episodes": frame}

    def _batches(self, policy: Any, split: str, batches: range | None = None) -> Iterator[tuple[int, pd.DataFrame]]:
        data, size = self.dataset(split), self.eval_batch_size
        chosen = range(-(-len(data) // size)) if batches is None else batches
        parts = [list(range(size * batch, min(size * (batch + 1), len(data)))) for batch in chosen]
        with progress("windows", sum(map(len, parts))) as advance:
            for batch, rows in zip(chosen, parts, strict=True):
                windows = data[rows]
                windows["history"] = disturbed(windows["history"], windows["window"], self.noise_deg, self.missing)
                if self.timed and batch == chosen[0]:
                    for _ in range(SEEN):  # which compiles, captures and fills caches
                        self._predict(policy, windows)
                began = now()
                errors = window_errors(self._predict(policy, windows), windows["future"].numpy())
                told = {"ms": np.full(len(rows), 1000 * (now() - began) / len(rows))} if self.timed else {}
                told |= getattr(policy, "told", {})
                advance(len(rows))
                about = {**data.identify(rows), "cluster": data.windows.trace[np.asarray(rows)]}
                yield batch + 1, pd.DataFrame({**about, **errors, **told})

    def watch(self, policy: Any) -> dict[str, pd.DataFrame]:
        """Predict some of the validation windows, spread over all of them.

        Returns:
            ``episodes``, one row a window, and ``samples``, one row a sample (`sample_table`).
        """
        from tasks.viewport_prediction.figures import sample_table  # imported late: matplotlib takes a while

        data = self.dataset("valid")
        rows = np.unique(np.linspace(0, len(data) - 1, WATCHED).round().astype(int)).tolist()
        batch = data[rows]
        history, future = batch["history"].numpy(), batch["future"].numpy()
        prediction = self._predict(policy, batch)
        episodes = {"window": rows, "cluster": data.windows.trace[rows], **window_errors(prediction, future)}
        period = float(np.median(np.diff(data.traces.times[: data.traces.lengths[0]])))
        t_s = period * np.arange(1 - self.history, self.horizon + 1)
        samples = sample_table(data.windows, rows, t_s, history, future, prediction)
        return {"episodes": pd.DataFrame(episodes), "samples": samples}

    def figures(self, watched: dict[str, dict[str, pd.DataFrame]]) -> "dict[str, Figure]":
        """Draw paths of some windows, and the error over the horizon."""
        from tasks.viewport_prediction.figures import draw_errors, draw_paths

        samples = {name: tables["samples"] for name, tables in watched.items()}
        return {"paths": draw_paths(samples), "error_over_horizon": draw_errors(samples)}

    def _predict(self, policy: Any, batch: Batch) -> np.ndarray:
        if isinstance(policy, ViewportModel):
            with torch.inference_mode():
                moved = {name: value.to(policy.device) for name, value in batch.items()}
                # What is timed is as fast as in use.
                found = predict(policy, moved) if self.timed else policy(moved)
                return wrap(policy.future(found, self.horizon)).float().cpu().numpy()
        if isinstance(policy, NetTask):
            raise UserError(f"the checkpoint is of {type(policy).__name__}, which predicts no viewports")
        prediction: np.ndarray = policy.predict(batch["history"].numpy(), self.horizon)
        return prediction
