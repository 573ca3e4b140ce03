"""Experience pools: what is written is read, windows stay inside episodes, broken pools are refused."""

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from netllm_pl import pool_format, pool_steps
from netllm_pl.errors import UserError
from netllm_pl.experience import Pool, PoolWriter, Together, Windows, read_pool
from netllm_pl.paths import file_sha256
from netllm_pl.rollout import Rollout

LENGTHS = (3, 7, 1, 12, 5)

pytestmark = pytest.mark.usefixtures("own_cache")


def episodes(lengths: tuple[int, ...] = LENGTHS, first: int = 0, ragged: bool = False) -> Rollout:
    """Episodes whose rewards are 100 * episode + step, and whose observations repeat that."""
    n, longest = len(lengths), max(lengths)
    alive = np.arange(longest)[:, None] < np.asarray(lengths)
    number = 100.0 * (first + np.arange(n)) + np.arange(longest)[:, None]
    observations: dict[str, Any] = {
        "where": number,
        "pair": np.stack([number, -number], -1),
        "grid": (np.arange(6).reshape(2, 3) + number[..., None, None]).astype(np.int64),
        "odd": number % 2 == 1,
        "reward": number,
    }
    if ragged:
        nodes = np.empty((longest, n), object)
        for t, e in np.ndindex(longest, n):
            nodes[t, e] = np.full(((t + e) % 4, 2), number[t, e])
        observations["nodes"] = nodes
    padded = np.where(alive, number, np.nan)  # what lies behind an episode's end must not matter
    return Rollout(number.astype(np.int64) % 3, padded, alive, {}, observations, {})


def write(folder: Path, task: str = "Toy", parts: int = 2, **options: Any) -> Path:
    with PoolWriter(folder, task, {"seed": 0}) as writer:
        for part in range(parts):
            first = part * len(LENGTHS)
            writer.add(episodes(first=first, **options), f"policy{part}", np.arange(first, first + len(LENGTHS)))
    return folder


def resident_mb() -> float:
    """Memory of this process, mapped pages included."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        pytest.skip("this system does not tell a process's memory")
    return int(file.read_text().split()[1]) * resource.getpagesize() / 1e6


def frame(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


# Writing --------------------------------------------------------------------------------------------------------------


def test_rows_are_the_steps_of_the_episodes_in_order(tmp_path: Path) -> None:
    table = frame(write(tmp_path / "pool"))
    assert len(table) == 2 * sum(LENGTHS)
    assert list(table["episode"]) == [e for e, length in enumerate(LENGTHS * 2) for _ in range(length)]
    assert list(table["step"]) == [step for length in LENGTHS * 2 for step in range(length)]
    expected = 100.0 * table["episode"] + table["step"]
    assert (table["reward"] == expected).all() and (table["where"] == expected).all()
    assert (table["action"] == expected % 3).all()
    assert (np.stack(table["pair"]) == np.stack([expected, -expected], 1)).all()
    assert (np.stack(table["grid"]) == np.arange(6) + expected.to_numpy()[:, None]).all()


def test_returns_to_go_are_exact_sums(tmp_path: Path) -> None:
    table = frame(write(tmp_path / "pool"))
    for _, episode in table.groupby("episode"):
        rewards = list(episode["reward"])
        assert list(episode["return_to_go"]) == [sum(rewards[t:]) for t in range(len(rewards))]


def test_the_manifest_tells_columns_policies_and_returns(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path / "pool") / "manifest.json").read_text())
    assert (manifest["task"], manifest["episodes"], manifest["steps"]) == ("Toy", 10, 2 * sum(LENGTHS))
    assert manifest["columns"]["grid"] == {"dtype": "int64", "shape": [2, 3]}
    assert manifest["columns"]["odd"] == {"dtype": "bool", "shape": []}
    assert manifest["columns"]["where"] == {"dtype": "float32", "shape": []}
    returns = [sum(100 * e + t for t in range(length)) for e, length in enumerate(LENGTHS * 2)]
    second = manifest["policies"]["policy1"]
    assert (second["episodes"], second["steps"]) == (5, sum(LENGTHS))
    assert second["return"] == {"min": min(returns[5:]), "mean": sum(returns[5:]) / 5, "max": max(returns[5:])}
    assert manifest["return"]["min"] == 3.0 and manifest["made_by"]["seed"] == 0


def test_the_standard_reader_of_datasets_streams_a_pool(tmp_path: Path) -> None:
    files = str(write(tmp_path / "pool") / "part-*.parquet")
    rows = list(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert len(rows) == 2 * sum(LENGTHS) and rows[4]["pair"] == [101.0, -101.0]
    assert read_pool(tmp_path / "pool").dataset[4]["pair"] == [101.0, -101.0]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PoolWriter(tmp_path / "pool", "Toy") as writer:
        writer.add(episodes(), "a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    folder = write(tmp_path / "pool")
    before = file_sha256(folder / "manifest.json")
    with pytest.raises(UserError, match="exists"):
        write(folder)
    with pytest.raises(UserError, match="exists"), PoolWriter(tmp_path / "late", "Toy") as writer:
        writer.add(episodes(), "a")
        write(tmp_path / "late")
    with PoolWriter(tmp_path / "race", "Toy", keep_existing=True) as writer:
        writer.add(episodes(), "a")
        write(tmp_path / "race")
    assert len(read_pool(tmp_path / "race").steps) == 10
    assert file_sha256(folder / "manifest.json") == before
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "late", "race"} | {"cache"}


def test_what_is_no_experience_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no episodes"), PoolWriter(tmp_path / "empty", "Toy"):
        pass
    broken = episodes()
    broken.rewards[1, 3] = np.inf
    with pytest.raises(UserError, match="'reward' is not finite in episode 3"), PoolWriter(tmp_path / "a", "T") as w:
        w.add(broken, "bba")
    other = episodes()
    other.observations["pair"] = np.zeros((12, 5, 4))
    with pytest.raises(ValueError, match="pair"), PoolWriter(tmp_path / "b", "Toy") as writer:
        writer.add(episodes(), "a")
        writer.add(other, "a")
    bare = Rollout(*(getattr(other, name) for name in ("actions", "rewards", "alive", "info")), {}, {})
    with pytest.raises(ValueError, match="record=True"), PoolWriter(tmp_path / "c", "Toy") as writer:
        writer.add(bare, "a")
    assert not any((tmp_path / name).exists() for name in ("empty", "a", "b", "c"))


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "mapped"])
@pytest.mark.parametrize("shard_bytes", [200, 2000, 1 << 26])
@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 1), (5, 2), (20, 7), (1, 1)])
def test_windows_stay_in_their_episode_and_cover_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, window: int, stride: int, positional: bool
) -> None:
    if positional:
        monkeypatch.setattr(pool_steps, "MAPPED_BYTES", 0)
    monkeypatch.setattr(pool_format, "SHARD_BYTES", shard_bytes)
    pool = read_pool(write(tmp_path / "pool"))
    assert (len(pool.manifest["shards"]) > 4) == (shard_bytes == 200)
    windows = Windows(pool, window, stride)
    batch = windows[list(range(len(windows)))]
    mask = batch["mask"]
    assert mask.shape == (len(windows), window)
    episode, step = (batch["where"] // 100)[mask], batch["step"][mask].float()
    assert torch.equal(batch["where"][mask] % 100, step)
    first = (batch["where"] // 100)[:, :1].expand(-1, window)
    assert torch.equal(episode, first[mask])  # no window crosses a border
    seen = {(int(e), int(t)) for e, t in zip(episode, step, strict=True)}
    assert seen == {(e, t) for e, length in enumerate(LENGTHS * 2) for t in range(length)}
    lengths = torch.tensor(LENGTHS * 2)[first[:, 0].long()]
    assert torch.equal(mask.sum(1), lengths.clamp(max=window))
    assert mask[:, 0].all() and torch.equal(mask.long().cumprod(1).bool(), mask)  # padding is at the end
    for values in batch.values():
        assert (values[~mask] == 0).all()
    assert torch.equal(batch["grid"][mask], torch.arange(6).view(2, 3) + batch["where"][mask].long()[:, None, None])
    assert torch.equal(batch["odd"][mask], batch["where"][mask] % 2 == 1)
    assert "episode" not in batch and batch["action"].dtype == torch.int64 and batch["reward"].dtype == torch.float32


def test_a_batch_may_hold_any_windows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_format, "SHARD_BYTES", 300)
    windows = Windows(read_pool(write(tmp_path / "pool")), 4, 1)
    whole = windows[list(range(len(windows)))]
    order = np.random.default_rng(0).integers(0, len(windows), 40).tolist()
    for name, values in windows[order].items():
        assert torch.equal(values, whole[name][order])
    for wrong in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[[wrong]]


def test_windows_of_chosen_episodes(tmp_path: Path) -> None:
    pool = read_pool(write(tmp_path / "pool"))
    chosen = pool.episodes.query("policy == 'policy1'")["episode"]
    windows = Windows(pool, 4, 4, chosen)
    batch = windows[list(range(len(windows)))]
    assert (batch["where"][batch["mask"]] >= 500).all()
    assert set((batch["where"][batch["mask"]] // 100).tolist()) == {5, 6, 7, 8, 9}
    with pytest.raises(UserError, match="window is 0"):
        Windows(pool, 0)


def test_several_pools_are_one_data_set(tmp_path: Path) -> None:
    parts = [Windows(read_pool(write(tmp_path / name, parts=count)), 4) for name, count in (("a", 1), ("b", 2))]
    both, first = Together(parts), len(parts[0])
    assert len(both) == first + len(parts[1])
    alone = [parts[0][[0, 3]], parts[1][[5, 0]]]
    for name, values in both[[0, first + 5, 3, first]].items():
        assert torch.equal(values, torch.cat([batch[name] for batch in alone]))
    with pytest.raises(UserError, match="different columns"):
        Together([parts[0], Windows(read_pool(write(tmp_path / "c", ragged=True)), 4)])


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "mapped"])
def test_observations_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool) -> None:
    if positional:
        monkeypatch.setattr(pool_steps, "MAPPED_BYTES", 0)
    monkeypatch.setattr(pool_format, "SHARD_BYTES", 400)
    pool = read_pool(write(tmp_path / "pool", ragged=True))
    assert pool.manifest["columns"]["nodes"] == {"dtype": "float32", "shape": [None, 2]}
    windows = Windows(pool, 5, 3)
    order = np.random.default_rng(1).permutation(len(windows)).tolist()
    batch = windows[order]
    lengths = batch["nodes_length"]
    where = batch["where"].long()
    expected = torch.where(batch["mask"], (where % 100 + where // 100 % 5) % 4, 0)
    assert torch.equal(lengths, expected) and lengths.max() == 3
    repeated = batch["where"].flatten().repeat_interleave(lengths.flatten())
    assert torch.equal(batch["nodes"], repeated[:, None].expand(-1, 2))


def test_a_pool_goes_to_another_process_as_a_path(tmp_path: Path) -> None:
    windows = Windows(read_pool(write(tmp_path / "pool")), 4)
    sent = pickle.dumps(windows)
    assert len(sent) < 3000
    again = pickle.loads(sent)
    assert torch.equal(again[[3, 1]]["pair"], windows[[3, 1]]["pair"])


def test_a_pool_is_converted_once_and_found_after_it_moved(tmp_path: Path, own_cache: Path) -> None:
    folder = write(tmp_path / "pool")
    read_pool(folder)
    (copy,) = (own_cache / "pools").iterdir()
    stamp = copy.stat().st_ino
    moved = folder.rename(tmp_path / "moved")
    assert len(read_pool(moved, "Toy")) == 2 * sum(LENGTHS)
    assert [path.stat().st_ino for path in (own_cache / "pools").iterdir()] == [stamp]


def test_memory_does_not_grow_with_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_steps, "MAPPED_BYTES", 2**20)
    steps, parts = 48, 40
    rollout = Rollout(
        np.zeros((steps, 100), np.int64), np.ones((steps, 100)), np.ones((steps, 100), bool), {},
        {"state": np.random.default_rng(0).random((steps, 100, 64))}, {},
    )  # fmt: skip
    with PoolWriter(tmp_path / "pool", "Toy") as writer:
        for _ in range(parts):
            writer.add(rollout, "a")
    windows = Windows(read_pool(tmp_path / "pool"), 20, 10)
    assert len(windows.pool) == steps * 100 * parts  # 192 thousand steps, 56 MB
    chosen = np.random.default_rng(0).integers(0, len(windows), (100, 64)).tolist()
    windows[chosen[0]]
    before = resident_mb()
    for indices in chosen:
        assert windows[indices]["return_to_go"].min() >= 1
    assert resident_mb() - before < 10


# Broken pools ---------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(folder: Path, table: pa.Table) -> None:
    """Change the first shard, and the manifest so that its identity fits."""
    file = folder / "part-00000.parquet"
    pq.write_table(table, file)
    identity = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    edit(folder, lambda manifest: manifest["shards"][0].update(identity))


def drop_column(folder: Path) -> None:
    rewrite(folder, pq.read_table(folder / "part-00000.parquet").drop_columns("reward"))


def change_type(folder: Path) -> None:
    table = pq.read_table(folder / "part-00000.parquet")
    where = table.schema.get_field_index("where")
    rewrite(folder, table.set_column(where, "where", table["where"].cast(pa.float64())))


def empty_cell(folder: Path) -> None:
    table = pq.read_table(folder / "part-00000.parquet")
    where = table.schema.get_field_index("where")
    values = table["where"].to_pylist()
    rewrite(folder, table.set_column(where, "where", pa.array([None, *values[1:]], pa.float32())))


def not_finite(folder: Path) -> None:
    table = pq.read_table(folder / "part-00000.parquet")
    where = table.schema.get_field_index("where")
    values = table["where"].to_pylist()
    rewrite(folder, table.set_column(where, "where", pa.array([np.nan, *values[1:]], pa.float32())))


def other_rows(folder: Path) -> None:
    table = pq.read_table(folder / "part-00000.parquet")
    rewrite(folder, table.take([1, 0, *range(2, len(table))]))


def fewer_rows(folder: Path) -> None:
    rewrite(folder, pq.read_table(folder / "part-00000.parquet").slice(0, 9))


def truncate(folder: Path) -> None:
    file = folder / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_unnoticed(folder: Path) -> None:
    file = folder / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    identity = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    edit(folder, lambda manifest: manifest["shards"][0].update(identity))


def flip(folder: Path) -> None:
    file = folder / "part-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json.*collect"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is broken"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is broken"),
        (lambda folder: edit(folder, lambda m: m.pop("columns")), "manifest.json is broken.*columns"),
        (lambda folder: edit(folder, lambda m: m.update(columns="x")), "manifest.json is broken"),
        (lambda folder: edit(folder, lambda m: m.update(shards=[])), "manifest.json is broken.*shards"),
        (lambda folder: edit(folder, lambda m: m.pop("task")), "manifest.json is broken.*task"),
        (lambda folder: edit(folder, lambda m: m.update(version=99)), "99, not netllm_pl experience pool 1"),
        (lambda folder: (folder / "part-00000.parquet").unlink(), "part-00000.parquet is missing"),
        (lambda folder: (folder / "episodes.parquet").unlink(), "episodes.parquet is missing"),
        (truncate, "part-00000.parquet has .* bytes in place of"),
        (truncate_unnoticed, "not a whole Parquet file"),
        (flip, "part-00000.parquet differs from what was collected"),
        (drop_column, "part-00000.parquet has no column 'reward'"),
        (change_type, "part-00000.parquet: column 'where' is double, expected float"),
        (empty_cell, r"row 0 \(episode 0, step 0\): column 'where' is empty or has empty cells"),
        (not_finite, r"row 0 \(episode 0, step 0\): column 'where' is not finite"),
        (other_rows, "row 0: episode and step"),
        (fewer_rows, "has 9 steps in place of 56"),
    ],
)
def test_a_broken_pool_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str, own_cache: Path) -> None:
    folder = write(tmp_path / "pool")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_pool(folder)
    assert len(str(caught.value).splitlines()) <= 2
    assert not list(own_cache.rglob("*.bin"))


def test_a_pool_of_another_task_or_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "pool")
    assert isinstance(read_pool(folder, "Toy"), Pool)
    with pytest.raises(UserError, match="belongs to Toy, not AdaptiveBitrateData"):
        read_pool(folder, "AdaptiveBitrateData")
    with pytest.raises(UserError, match="nowhere is no experience pool"):
        read_pool(tmp_path / "nowhere")
