"""Data modules: splits, one loader factory, and how a policy is run over the test split."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from netllm_pl.errors import UserError, at_least, unknown
from netllm_pl.parts import Shard
from netllm_pl.paths import weights_of
from netllm_pl.processes import rank, world
from netllm_pl.rollout import Environment, Rollout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from netllm_pl.evaluate import Metric
    from netllm_pl.timing import Work

Batch = dict[str, Tensor]
SPLITS = ("train", "valid", "test")


class BatchedDataset(Protocol):
    """A map-style data set that gathers a whole batch at once (Hugging Face `datasets` do so too).

    It may have ``identify(indices)``: columns (B,) by name that say what the samples are, for predictions.parquet.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, indices: list[int]) -> Batch:
        """Return the samples at the indices as one batch of tensors."""
        ...


class Batches(Sampler[list[int]]):
    """Batches of indices: shuffled by seed and epoch, shared out over processes, and able to start in the middle.

    In training, the batches of all processes at a step are together a batch of one process, which is as many times as
    large. In evaluation a process takes whole batches of those of one process, so that means over them are the same;
    where there are fewer batches than processes, or all must have equally many, they are smaller.

    Args:
        size: Number of samples.
        batch_size: Samples in a batch, per process.
        shuffle: Draw a new order each epoch; then an incomplete last batch is dropped if there is a full one.
        seed: Seed of the order.
        limit: Batches of an evaluation by all processes together; null takes all of them.
        even: Whether processes must evaluate equally many batches, as they do where each has a part of the weights.

    Attributes:
        begin: Samples of this epoch's training order, of all processes, that are left out: they were trained on.
        rank: Number of this process.
        world: How many processes there are.
    """

    def __init__(
        self, size: int, batch_size: int, shuffle: bool, seed: int, limit: int | None = None, even: bool = False
    ) -> None:
        self.size, self.batch_size, self.shuffle, self.seed, self.even = size, batch_size, shuffle, seed, even
        self.epoch = 0
        self.begin = 0
        self.rank, self.world = rank(), world()
        if limit is not None and not shuffle:
            self.size = min(size, max(limit * batch_size, self.world))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; a new epoch starts at its first batch."""
        if epoch != self.epoch:
            self.begin = 0
        self.epoch = epoch

    @property
    def step(self) -> int:
        """Samples of a training step of all processes."""
        return self.world * self.batch_size

    def __len__(self) -> int:
        """Batches of one epoch, for one process."""
        return max(1, self.size // self.step) if self.shuffle else len(self._own_parts())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this epoch that are left."""
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            begin = min(self.begin, self.size - self.world)
            own = order[begin + self.rank :: self.world]
            # What another number of processes has left of an epoch may be less than a whole batch.
            for batch in range(max(1, (self.size - begin) // self.step)):
                yield own[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
        else:
            yield from map(list, self._own_parts())

    def _own_parts(self) -> list[range]:
        """Return the samples of the batches that this process evaluates."""
        count = -(-self.size // self.batch_size)
        if count < self.world or (self.even and count % self.world):
            count = -(-count // self.world) * self.world
            edges = [self.size * place // count for place in range(count + 1)]
        else:
            edges = [min(place * self.batch_size, self.size) for place in range(count + 1)]
        return [range(edges[place], edges[place + 1]) for place in range(self.rank, count, self.world)]


class Loader(DataLoader[Batch]):
    """A data loader that knows where it is: Lightning saves that in checkpoints, so a run resumes in mid-epoch."""

    sampler: Batches
    consumed = 0
    """Samples of this epoch that all processes together have trained on."""

    @property
    def samples(self) -> BatchedDataset:
        """The data set that `NetDataModule.dataset` gave."""
        rows = self.dataset
        assert isinstance(rows, _Rows)
        return rows.data

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator can count what was really consumed
        """Yield the batches of this epoch that are left."""
        self.consumed = self.sampler.begin
        for batch in super().__iter__():
            self.consumed += self.sampler.step
            yield batch
        self.sampler.begin = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and samples consumed in it by all processes: any number of them can go on, with batches of any size.

        Returns:
            ``epoch``, ``samples``, and of how many (``size``); ``over``, 1 if no batch of the epoch is left.
        """
        sampler = self.sampler
        over = self.consumed >= len(sampler) * sampler.step
        return {"epoch": sampler.epoch, "samples": self.consumed, "size": sampler.size, "over": int(over)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the samples that were consumed."""
        sampler = self.sampler
        sampler.epoch = state["epoch"]
        if "samples" in state:
            sampler.begin = 0 if state["over"] else state["samples"]
        else:  # checkpoints of earlier versions count batches, of one process
            sampler.begin = state["consumed"] * sampler.step if state["consumed"] < len(sampler) else 0


class NetDataModule(pl.LightningDataModule, ABC):
    """Base of every task's data: a task overrides `dataset`, `episodes`, and the class attributes.

    Args:
        batch_size: Samples in a training batch, per process.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Loader processes; 0 gathers in the main process, which is fastest for data in memory.
        seed: Seed of the training order.
    """

    baselines: ClassVar[dict[str, Callable[[], Any]]] = {}
    """Hand-written policies by name."""
    metrics: ClassVar["tuple[Metric, ...]"] = ()
    """What `evaluate` reports, the main metric first."""
    compared: ClassVar[tuple[str, ...]] = ()
    """Baselines in the table at the end of `fit`."""
    flags: ClassVar[dict[str, str]] = {}
    """Switches that `evaluate` takes for this data: ``--NAME`` sets the argument NAME, a bool; and what each does."""
    note = ""
    """What a reader of the numbers must know; it stands above the table."""

    def __init__(self, batch_size: int = 64, eval_batch_size: int = 256, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        # Lightning would refuse to log them where a model has an argument of the same name and another value.
        self.save_hyperparameters(logger=False)
        at_least(1, "data.", batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, "data.", num_workers=num_workers, seed=seed)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed

    @abstractmethod
    def dataset(self, split: str) -> BatchedDataset:
        """Return the data set of a split (train, valid, test), checked and not empty."""

    @abstractmethod
    def episodes(self, policy: Any, split: str = "test") -> "pd.DataFrame":
        """Run a policy over a split.

        Returns:
            One row an episode or window: ids, `cluster` (int, what the bootstrap resamples) and the metrics' columns.
        """

    def tables(self, policy: Any, steps: bool = False) -> "dict[str, pd.DataFrame]":
        """Run a policy over the test split; a task whose episodes have steps overrides this.

        Returns:
            `episodes`, and `steps` (ids and what happened, one row a step) if they are asked for.
        """
        if steps:
            raise UserError(f"{type(self).__name__} has no steps, only whole predictions; leave out --steps")
        return {"episodes": self.episodes(policy)}

    def fingerprint(self, split: str) -> str:
        """Hash of what the episodes of a split depend on beside the arguments, such as a file; empty if of nothing.

        What was left by an interrupted `evaluate` or `collect` is gone on from only where it is the same.
        """
        return ""

    def batches(self) -> int:
        """Into how many parts the test split can be divided, between machines and by interruptions; 1: into none."""
        return 1

    def batch_tables(
        self, policy: Any, steps: bool = False, batches: range | None = None
    ) -> "Iterator[tuple[int, dict[str, pd.DataFrame]]]":
        """Run a policy over batches of the test split; a task with more than one of `batches` overrides this.

        Args:
            policy: The policy.
            steps: Whether steps are asked for.
            batches: Which ones; null takes all.

        Yields:
            How many batches are done, those before ``batches`` included, and the rows of `tables` that were new. What
            cannot be divided comes with the first batch.
        """
        if batches is None or 0 in batches:
            yield 1, self.tables(policy, steps)

    def watch(self, policy: Any) -> "dict[str, pd.DataFrame]":
        """Run a policy over the validation split, or a part of it, and tell all that `figures` shows.

        Returns:
            `episodes`, and whatever else `figures` reads. Of a task that acts, `episodes` are those of the method of
            that name: the evaluation by rollout reads its metrics off them.
        """
        return {"episodes": self.episodes(policy, "valid")}

    def share(self, policy: Any, split: str, watched: bool, shard: Shard) -> "dict[str, pd.DataFrame]":
        """Run a policy over one of equal shares of a split, for an evaluation by several processes.

        A task whose split can be divided overrides this; of others the first share is all of it.

        Args:
            policy: The policy.
            split: Whose episodes.
            watched: Tell of the validation split what `watch` does, instead of ``episodes`` alone.
            shard: Which share.

        Returns:
            The rows of this share; nothing if it is empty.
        """
        if shard.number > 1:
            return {}
        return self.watch(policy) if watched else {"episodes": self.episodes(policy, split)}

    def figures(self, watched: "dict[str, dict[str, pd.DataFrame]]") -> "dict[str, Figure]":
        """Draw what policies did on the validation split (see `netllm_pl.drawing`); by default nothing.

        Args:
            watched: What `watch` told, by name of the policy: first ``model``, the one under training, then baselines.

        Returns:
            Figures by name; TensorBoard shows them as ``figures/<name>``.
        """
        return {}

    def policy(self, name: str, split: str = "test") -> Any:
        """Build a policy for the episodes of a split from its name: a baseline, a checkpoint, or an exported folder."""
        if name in self.baselines:
            return self.baselines[name]()
        path = Path(name)
        if path.exists() or path.suffix == ".ckpt":
            from netllm_pl.checkpoint import load_task

            return load_task(path, "cuda" if torch.cuda.is_available() else "cpu")
        raise unknown("policy", name, self.baselines, "The path of a checkpoint or of an exported folder is one too.")

    def made_of(self, names: Collection[str]) -> dict[str, str]:
        """What policies depend on, such as hashes of the files that they are read from.

        What was recorded, or left by an interrupted command, is taken only where it is the same.
        """
        return weights_of(names)

    def simulator(self, split: str, mode: str = "fixed") -> Environment:
        """Return the simulator of a split; decision tasks override this.

        Args:
            split: Whose episodes.
            mode: ``fixed`` runs the split's own episodes in order, ``random`` draws them.
        """
        raise UserError(f"{type(self).__name__} has no simulator: only decision tasks act and collect experience")

    def label(self, env: Environment, values: str) -> Environment:
        """Wrap a simulator so that ``info["values"]`` of each step holds the values (N, A) of all actions before it.

        Args:
            env: What `simulator` returned.
            values: Which kind of values, such as ``hindsight``.
        """
        raise UserError(f"{type(self).__name__} knows no action values '{values}'; leave out --values")

    def convert(self, file: Path) -> Iterable[Rollout]:
        """Read the episodes of a pool that another program published, with observations as `simulator` gives them."""
        raise UserError(f"{type(self).__name__} reads no published pools; {file} cannot be converted")

    def benchmarks(self) -> "dict[str, Work]":
        """List what `benchmark` measures beside the task itself, such as the speed of a simulator; by default nothing.

        Names are parts of a JSON file: letters, digits and underscores.
        """
        return {}

    def loader(self, split: str, limit: int | None = None) -> Loader:
        """Make the loader of a split: the one factory behind all of them.

        Args:
            split: One of `SPLITS`.
            limit: Batches of an evaluation by all processes together; null takes all of them.
        """
        train = split == "train"
        data = self.dataset(split)
        if len(data) == 0:
            raise UserError(f"split '{split}' is empty; check the data's splits")
        if len(data) < world():
            raise UserError(f"split '{split}' has {len(data)} samples for {world()} processes; take fewer devices")
        size = self.batch_size if train else self.eval_batch_size
        return Loader(
            _Rows(data),
            sampler=Batches(len(data), size, train, self.seed, limit, self._even()),
            batch_size=None,  # a sampler item is a whole batch: one vectorised gather
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_interrupts_to_the_main_process if self.num_workers else None,
            generator=torch.Generator(),  # else each epoch's start draws from the global one, and a resumed run differs
        )

    def _limit(self, name: str) -> int | None:
        """Return how many batches the trainer evaluates, if it was told a number; Lightning means each process."""
        limit = None if self.trainer is None else getattr(self.trainer, name)
        return limit if isinstance(limit, int) and limit else None

    def _even(self) -> bool:
        if world() == 1 or self.trainer is None:
            return False
        from netllm_pl.backbone import is_sharded  # imported late: data alone need no language model

        return is_sharded(self.trainer.lightning_module)

    def train_dataloader(self) -> Loader:
        """Loader of the training split."""
        return self.loader("train")

    def val_dataloader(self) -> Loader:
        """Loader of the validation split."""
        return self.loader("valid", self._limit("limit_val_batches"))

    def test_dataloader(self) -> Loader:
        """Loader of the test split."""
        return self.loader("test", self._limit("limit_test_batches"))

    def predict_dataloader(self) -> Loader:
        """Loader of the test split."""
        return self.loader("test")


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C, and a cluster's SIGTERM, reach all processes, and the main one needs the others to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only the first one: the second is PyTorch's, for a worker that does not end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class _Rows(Dataset[Batch]):
    """Gives a batched data set the type that DataLoader asks for."""

    def __init__(self, data: BatchedDataset) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> Batch:
        return self.data[indices]

    def __len__(self) -> int:
        return len(self.data)
