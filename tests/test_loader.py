"""Loaders: each sample once, an order that depends on seed and epoch only, a place that can be stored."""

from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer

from netllm_pl.data import Batch, Batches, Loader, NetDataModule
from netllm_pl.errors import UserError


class _Numbers:
    """Samples that are their own index."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[list[int]] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: list[int]) -> Batch:
        self.calls.append(indices)
        return {"index": torch.tensor(indices)}


class _NumbersData(NetDataModule):
    def __init__(self, sizes: dict[str, int], **settings: Any) -> None:
        super().__init__(**settings)
        self.sizes = sizes

    def dataset(self, split: str) -> _Numbers:
        return _Numbers(self.sizes[split])

    def episodes(self, policy: Any) -> pd.DataFrame:
        return pd.DataFrame()


def loader(size: int = 22, split: str = "train", **settings: Any) -> Loader:
    return _NumbersData({split: size}, **{"batch_size": 4, "eval_batch_size": 4, **settings}).loader(split)


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def drain(batches: Loader | Batches) -> list[list[int]]:
    return [item if isinstance(item, list) else item["index"].tolist() for item in batches]


def stop(*loaders: Loader) -> None:
    """End the workers, as the trainer does: the garbage collector may wait five seconds for each one."""
    for one in loaders:
        if one.num_workers:
            one._iterator._shutdown_workers()  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_covers_each_sample_once_in_full_batches(workers: int) -> None:
    source = loader(22, num_workers=workers)
    batches = drain(source)
    stop(source)
    assert [len(batch) for batch in batches] == [4] * 5
    seen = flat(batches)
    assert len(set(seen)) == 20 and set(seen) <= set(range(22)) and seen != sorted(seen)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_covers_everything_in_order(split: str) -> None:
    batches = loader(22, split)
    assert drain(batches) == [list(range(k, min(k + 4, 22))) for k in range(0, 22, 4)] and len(batches) == 6


def test_fewer_samples_than_a_batch_make_one_batch() -> None:
    assert [sorted(batch) for batch in drain(loader(3))] == [[0, 1, 2]]


def test_a_batch_is_gathered_by_one_call() -> None:
    batches = loader(8)
    drain(batches)
    rows = batches.dataset.data  # type: ignore[attr-defined]
    assert [len(call) for call in rows.calls] == [4, 4]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = loader(40, seed=seed)
        batches.sampler.set_epoch(epoch)
        return drain(batches)

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(0, 1) != first != order(1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_alone(workers: int) -> None:
    """Else a run that resumes, and so makes its loaders anew, would draw other numbers."""
    state = torch.get_rng_state()
    source = loader(num_workers=workers)
    drain(source)
    stop(source)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 3, 5])
def test_a_loader_goes_on_where_it_was(workers: int, consumed: int) -> None:
    whole, first = loader(22), loader(22, num_workers=workers)
    for one in (whole, first):
        one.sampler.set_epoch(3)
    batches, stream = drain(whole), iter(first)
    for _ in range(consumed):
        next(stream)
    state = first.state_dict()
    list(stream)  # workers that are left in mid-epoch take seconds to stop
    stop(first)
    assert state == {"epoch": 3, "samples": 4 * consumed, "size": 22, "over": int(consumed == 5)}
    second = loader(22, num_workers=workers)
    second.load_state_dict(state)
    second.sampler.set_epoch(3)  # as the trainer does at the start of an epoch
    left = drain(second)
    # Behind the last batch the epoch is over: the next one is drawn from its beginning.
    assert left == (batches[consumed:] or batches)
    second.sampler.set_epoch(4)
    whole.sampler.set_epoch(4)
    following = drain(second), drain(second)
    stop(second)
    assert following[0] == drain(whole) and len(following[1]) == 5


def shard(rank: int, size: int, shuffle: bool, world: int = 2, epoch: int = 0) -> Batches:
    batches = Batches(size, 4, shuffle, seed=0)
    batches.rank, batches.world = rank, world
    batches.set_epoch(epoch)
    return batches


@pytest.mark.parametrize("size", [8, 16, 23, 41])
def test_processes_train_on_different_samples_in_equal_steps(size: int) -> None:
    shards = [drain(shard(rank, size, shuffle=True)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == len(shard(0, size, True)) == max(1, size // 2 // 4)
    a, b = (set(flat(batches)) for batches in shards)
    assert not a & b and len(a) == len(b) == 4 * len(shards[0])


@pytest.mark.parametrize("size", [2, 8, 9, 16, 17, 23, 41])
def test_processes_share_evaluation_without_gaps_or_empty_batches(size: int) -> None:
    shards = [shard(rank, size, shuffle=False) for rank in range(2)]
    batches = [drain(one) for one in shards]
    assert sorted(flat(batches[0]) + flat(batches[1])) == list(range(size))
    assert all(batch for share in batches for batch in share)
    assert [len(one) for one in shards] == [len(share) for share in batches]


def test_the_process_group_says_who_takes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    batches = loader(30, "test").sampler
    assert (batches.rank, batches.world) == (1, 3) and flat(drain(batches)) == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="split 'valid' is empty"):
        loader(0, "valid")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(UserError, match="unknown policy 'nobody'"):
        _NumbersData({}).policy("nobody")


def test_only_the_trainers_own_passes_are_limited() -> None:
    """A table after training has every sample, whatever the trainer was told of its validation and test passes."""
    data = _NumbersData({"valid": 22, "test": 22}, batch_size=4, eval_batch_size=4)
    data.trainer = Trainer(
        accelerator="cpu", limit_val_batches=2, limit_test_batches=3, logger=False, enable_checkpointing=False
    )
    assert [len(each) for each in (data.val_dataloader(), data.test_dataloader())] == [2, 3]
    assert [len(each) for each in (data.predict_dataloader(), data.loader("valid"), data.loader("test"))] == [6, 6, 6]
