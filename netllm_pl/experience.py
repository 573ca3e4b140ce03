"""Experience pools: recorded episodes on disk, cut into windows for training.

`netllm_pl.pool_format` says how the files look. Shapes: B windows in a batch, W steps of a window.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from netllm_pl.data import Batch
from netllm_pl.errors import UserError
from netllm_pl.paths import cache_dir, file_sha256
from netllm_pl.pool_check import read_episodes, read_manifest, write_copy
from netllm_pl.pool_format import MANIFEST, PoolWriter, columns_of
from netllm_pl.pool_steps import Rows, Steps
from netllm_pl.ragged import as_tensor
from netllm_pl.rollout import Array

if TYPE_CHECKING:
    import datasets

__all__ = ["Pool", "PoolWriter", "Together", "Windows", "read_pool"]


class Pool:
    """An experience pool on disk; `read_pool` opens one. Of a large one, no more is in memory than is being read.

    Args:
        folder: Where it lies.
        manifest: What its manifest says.
        episodes: Columns episode, policy, seed, steps, return; one row an episode.
        rows: Its steps.

    Attributes:
        columns: Type and shape of its columns.
        starts: (episodes,) row of each episode's first step.
        steps: (episodes,) their lengths.
        returns: (episodes,) their sums of rewards.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], episodes: pd.DataFrame, rows: Steps) -> None:
        self.folder, self.manifest, self.episodes, self.rows = folder, manifest, episodes, rows
        self.columns = rows.columns
        self.steps: Rows = episodes["steps"].to_numpy(np.int64)
        self.starts: Rows = np.concatenate([[0], np.cumsum(self.steps)[:-1]])
        self.returns: npt.NDArray[np.float64] = episodes["return"].to_numpy()

    def __reduce__(self) -> tuple[Callable[..., "Pool"], tuple[Path]]:
        """Open the files again in another process: what lies in them must not be copied."""
        return read_pool, (self.folder,)

    def __len__(self) -> int:
        """Number of steps."""
        return int(self.manifest["steps"])

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """All steps as a memory-mapped data set of Hugging Face `datasets`: to look at, filter or map."""
        import datasets  # imported late: it takes a second

        files = [str(self.folder / shard["file"]) for shard in self.manifest["shards"]]
        cache = str(cache_dir() / "datasets")
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)


class Windows:
    """Windows of consecutive steps of one episode, gathered a batch at a time: what decision tasks train on.

    Windows begin every ``stride`` steps; the last one of an episode ends with it, so every step is in a window if the
    stride is at most the window. An episode shorter than a window is one window, padded at its end.

    Args:
        pool: Where the steps come from.
        window: Steps of a window (W).
        stride: Steps between the beginnings of two windows; null takes the window.
        episodes: (E,) numbers of the episodes to use, such as those of some policies; null takes all.
    """

    def __init__(
        self, pool: Pool, window: int, stride: int | None = None, episodes: npt.ArrayLike | None = None
    ) -> None:
        stride = window if stride is None else stride
        if window < 1 or stride < 1:
            raise UserError(f"window is {window} and stride {stride}; both must be at least 1")
        self.pool, self.window, self.stride = pool, window, stride
        self.episodes: Rows = np.arange(len(pool.steps)) if episodes is None else np.asarray(episodes, np.int64)
        spare = np.maximum(pool.steps[self.episodes] - window, 0)
        counts = 1 + -(-spare // stride)
        self._spare = spare
        self._edges: Rows = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._edges[-1])

    def __getitem__(self, indices: list[int]) -> Batch:
        """Gather windows in one go.

        Returns:
            Every column of the pool but ``episode``: ``action`` (B, W), ``reward`` (B, W), ``return_to_go`` (B, W),
            observations (B, W, ...), ``values`` (B, W, A) if the pool has them; ``step`` (B, W), place in the episode;
            and ``mask`` (B, W), True at real steps. Padding is zero. Floats are float32, integers int64. A column
            whose length differs between steps gives the values of all real steps, one behind the other, and
            ``<name>_length`` (B, W).
        """
        chosen = np.asarray(indices, np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"windows are numbered from 0 to {len(self) - 1}")
        number = np.searchsorted(self._edges, chosen, side="right") - 1
        begin = np.minimum((chosen - self._edges[number]) * self.stride, self._spare[number])
        episode = self.episodes[number]
        step = begin[:, None] + np.arange(self.window)
        mask = step < self.pool.steps[episode][:, None]
        taken = self.pool.rows.take(self.pool.starts[episode] + begin, mask.sum(1))
        batch = {"step": as_tensor(np.where(mask, step, 0)), "mask": torch.from_numpy(mask)}
        for name, (values, lengths) in taken.items():
            if name in ("episode", "step"):
                continue
            if self.pool.columns[name].dtype == "bool":
                values = values.view(np.bool_)
            if lengths is None:
                batch[name] = as_tensor(_spread(values, mask))
            else:
                batch[name] = as_tensor(values)
                batch[f"{name}_length"] = as_tensor(_spread(lengths, mask))
        return batch

    def identify(self, indices: list[int]) -> dict[str, Array]:
        """Say whose windows they are: numbers of the episodes in the pool, and who acted in them, (B,) each."""
        number = np.searchsorted(self._edges, np.asarray(indices, np.int64), side="right") - 1
        episode = self.episodes[number]
        return {"episode": episode, "policy": self.pool.episodes["policy"].to_numpy(str)[episode]}


class Together:
    """Windows of several pools as one data set.

    Args:
        parts: Windows of equal length from pools with the same columns.

    Raises:
        UserError: The columns of the pools differ.
    """

    def __init__(self, parts: Sequence[Windows]) -> None:
        self.parts = parts
        self._edges: Rows = np.cumsum([0, *(len(part) for part in parts)])
        first = parts[0].pool
        for part in parts[1:]:
            if part.pool.columns != first.columns:
                raise UserError(
                    f"the pools {first.folder} and {part.pool.folder} have different columns; collect both with the "
                    "same settings of the data, and both with --values or both without"
                )

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._edges[-1])

    def __getitem__(self, indices: list[int]) -> Batch:
        """Gather windows, as `Windows` does; those of one pool are neighbours."""
        chosen = np.asarray(indices, np.int64)
        which = np.searchsorted(self._edges, chosen, side="right") - 1
        taken = [
            part[(chosen[which == number] - self._edges[number]).tolist()]
            for number, part in enumerate(self.parts)
            if (which == number).any()
        ]
        return {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}

    def identify(self, indices: list[int]) -> dict[str, Array]:
        """Say whose windows they are, as `Windows` does, and in which pool, in the order of the batch."""
        chosen = np.asarray(indices, np.int64)
        which = np.searchsorted(self._edges, chosen, side="right") - 1
        found = [
            part.identify((chosen[which == number] - self._edges[number]).tolist())
            for number, part in enumerate(self.parts)
            if (which == number).any()
        ]
        joined = {name: np.concatenate([about[name] for about in found]) for name in found[0]}
        return joined if len(self.parts) == 1 else {"pool": np.sort(which), **joined}


def read_pool(folder: Path | str, task: str | None = None) -> Pool:
    """Open a pool; at the first time its steps are checked and copied into the cache, to be read in any order.

    Args:
        folder: What `collect` wrote.
        task: Class name of the data module that it must belong to; null takes any.

    Raises:
        UserError: It is no pool, not whole, or of another task.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if task not in (None, manifest["task"]):
        raise UserError(f"the pool {folder} belongs to {manifest['task']}, not {task}; collect one with this config")
    copy = cache_dir() / "pools" / file_sha256(folder / MANIFEST)[:32]
    try:
        episodes = read_episodes(folder, manifest)
        if not copy.is_dir():
            write_copy(folder, manifest, episodes["steps"].to_numpy(), copy)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the pool {folder} cannot be read: {str(error).splitlines()[0]}") from error
    return Pool(folder.resolve(), manifest, episodes, Steps(copy, columns_of(manifest)))


def _spread(values: Array, mask: npt.NDArray[np.bool_]) -> Array:
    """Put the values of real steps (R, ...) at their places (B, W, ...), zero elsewhere."""
    if mask.all():
        return values.reshape(*mask.shape, *values.shape[1:])
    out = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    out[mask] = values
    return out
