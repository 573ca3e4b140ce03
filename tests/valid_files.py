"""Small valid files of every kind that is read, for tests that break them."""

import io
import json
import pickle
import re
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Write = Callable[[Path], list[Path]]
"""Writes a valid file, or folder, at a path, and says which files may be mutated."""


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        read: Reads a path.
        writes: Ways to make a valid file or folder.
        suffix: Of the path.
        share: Of all inputs, relative to the others.
    """

    read: Callable[[Path], Any]
    writes: tuple[Write, ...]
    suffix: str = ""
    share: float = 1.0


# Valid files ----------------------------------------------------------------------------------------------------------


def text(content: str) -> Write:
    """A file of text."""

    def write(path: Path) -> list[Path]:
        path.write_text(content)
        return [path]

    return write


def table(columns: dict[str, Any], **options: Any) -> Write:
    """A Parquet file."""

    def write(path: Path) -> list[Path]:
        pq.write_table(pa.table(columns), path, **options)
        return [path]

    return write


def tables(columns: dict[str, Any]) -> tuple[Write, ...]:
    """Parquet files of one content in several encodings."""
    return (
        table(columns),
        table(columns, compression="none", use_dictionary=False, write_statistics=False),
        table(columns, compression="zstd", data_page_version="2.0", row_group_size=5, store_schema=False),
    )


def folder(parts: dict[str, Callable[[Path], object]]) -> Write:
    """A folder of files, each written by a function."""

    def write(path: Path) -> list[Path]:
        files = []
        for name, part in parts.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            part(file)
            files.append(file)
        return files

    return write


def _trace() -> dict[str, Any]:
    times, rates = np.r_[np.arange(7), np.arange(5)] * 0.5, 1 + np.arange(12) % 5 / 3
    names = pa.array(["a_trace_1_x"] * 7 + ["b"] * 5)
    return {"trace_name": names, "time_s": times, "bandwidth_mbps": rates, "start_ptr": [1] * 12, "source": names}


def _viewports() -> dict[str, Any]:
    angles = {name: np.linspace(-30, 30, 24).astype(np.float32) * k for k, name in enumerate(("roll", "pitch", "yaw"))}
    return {"video": [1] * 12 + [2] * 12, "user": ["u", "7"] * 12, "t": np.arange(24) * 0.2, **angles}


def _jobs() -> dict[str, Any]:
    lists, inner = pa.list_(pa.int64()), pa.list_(pa.list_(pa.float64()))
    return {
        "size": ["2g"] * 3 + ["10g"] * 3,
        "query": [1] * 6,
        "stage": [0, 1, 2] * 2,
        "children": pa.array([[1, 2], [2], []] * 2, lists),
        "levels": pa.array([[5, 10]] * 6, lists),
        "first": pa.array([[[9.0, 7.0], [8.0]]] * 6, inner),
        "fresh": pa.array([[[7.0], []]] * 6, inner),
        "rest": pa.array([[[5.0, 6.0], [4.0]]] * 6, inner),
    }


def _published_jobs(path: Path) -> list[Path]:
    waves = {"first_wave": {5: [9.0, 7], 10: [8]}, "fresh_durations": {5: [7.0], 10: []}, "rest_wave": {5: [], 10: [4]}}
    files = []
    for size in ("2g", "10g"):
        (path / size).mkdir(parents=True)
        adjacency, durations = path / size / "adj_mat_1.npy", path / size / "task_duration_1.npy"
        np.save(adjacency, np.triu(np.ones((3, 3)), 1).astype(np.int64 if size == "2g" else bool))
        np.save(durations, {k: waves for k in range(3)})  # type: ignore[arg-type]
        files += [adjacency, durations]
    return files


class ExperiencePool:
    """Stands in for the class of published pools."""


def _experience(protocol: int) -> Write:
    def write(path: Path) -> list[Path]:
        pool = ExperiencePool()
        state = np.zeros((6, 6))
        state[0, -1], state[5, -1] = 300 / 4300, 1 / 48
        pool.__dict__.update(states=[state, state.copy()], actions=[1, np.int64(2)], rewards=[0.5, np.float64(1)])
        pool.__dict__["dones"] = [True, True]
        path.write_bytes(pickle.dumps(pool, protocol))
        return [path]

    return write


def _pool(path: Path) -> list[Path]:
    from netllm_pl.pool_format import PoolWriter
    from netllm_pl.rollout import Rollout

    ragged = np.empty((3, 1), object)
    for k in range(3):
        ragged[k, 0] = np.ones((k + 1, 2), np.float32)
    seen = {"level": np.arange(3)[:, None], "buffer": np.ones((3, 1, 4), np.float32), "nodes": ragged}
    shape = (3, 1)
    with PoolWriter(path, "AnyData") as writer:
        writer.add(Rollout(np.zeros(shape, np.int64), np.ones(shape), np.ones(shape, bool), {}, seen, {}), "someone")
    return sorted(path.iterdir())


def _pictures(kind: str) -> Write:
    def write(path: Path) -> list[Path]:
        from PIL import Image

        (path / "1").mkdir(parents=True)
        files = [path / "1" / f"{k}.{kind}" for k in range(2)]
        for k, file in enumerate(files):
            Image.fromarray((np.arange(48).reshape(4, 4, 3) * (k + 1)).astype(np.uint8)).save(file)
        return files

    return write


def _archive(compression: str) -> Write:
    def write(path: Path) -> list[Path]:
        with tarfile.open(path, f"w:{compression}", format=tarfile.PAX_FORMAT) as tar:
            for name in ("repo/data/1.csv", "repo/data/" + "long/" * 30 + "2.csv", "repo/other"):
                member = tarfile.TarInfo(name)
                member.size = 30
                tar.addfile(member, io.BytesIO(b"0,1,2,3\n" * 3 + b"\n" * 6))
        return [path]

    return write


def _weights(path: Path) -> list[Path]:
    np.savez(path, first=np.ones((3, 2), np.float32), second=np.zeros(4))
    return [path]


def _checkpoint(path: Path) -> list[Path]:
    import torch

    from netllm_pl.checkpoint import KEY

    known = {"task": "ViewportGRU", "init_args": {"hidden": 4}, "frozen": {}, "version": "1"}
    torch.save({KEY: known, "state_dict": {"weight": torch.ones(3)}, "epoch": 1}, path)
    return [path]


def readers() -> dict[str, Reader]:
    """All readers by name."""
    from netllm_pl.archive import pick_members
    from netllm_pl.checkpoint import read_checkpoint
    from netllm_pl.experience import read_pool
    from netllm_pl.sources import read_yaml
    from netllm_pl.weights import read_weights
    from tasks.adaptive_bitrate.published_pool import read_published
    from tasks.adaptive_bitrate.traces import read_traces
    from tasks.adaptive_bitrate.videos import read_video
    from tasks.job_scheduling.workloads import read_workload
    from tasks.throughput_prediction.data import read_traces as read_throughput
    from tasks.viewport_prediction.pictures import read_pictures
    from tasks.viewport_prediction.traces import read_traces as read_viewports

    lines = "".join(f"{k * 0.5} {1 + k % 4 / 3}\n" for k in range(12))
    video = {"bitrate_kbps": [300, 750], "chunk_s": 4.0, "chunk_bytes": [[150000, 160000, 1], [375000, 380000, 2]]}
    sizes = {f"video_size_{k}": text("".join(f"{9000 + c * k}\n" for c in range(4))) for k in range(6)}
    rows = "".join(f"{k / 5},{k},-{k}.5,1e{k % 3}\n" for k in range(12))
    pattern = re.compile(r"data/((?:long/)*\d\.csv)")

    def pick(path: Path) -> int:
        with tempfile.TemporaryDirectory(dir=path.parent) as out:
            return pick_members(path, pattern, Path(out))

    return {
        "trace_text": Reader(read_traces, (text(lines), text("\r\n".join(lines.splitlines()))), ".log", 7),
        "trace_packets": Reader(read_traces, (text("1\n1\n7\n900\n1500\n"), text("0\n3\n3\n")), ".txt", 4),
        "trace_parquet": Reader(read_traces, tables(_trace()), ".parquet", 4),
        "video_json": Reader(
            read_video, (text(json.dumps({"v": video})), text(json.dumps({"v": video}, indent=1))), "", 7
        ),
        "video_sizes": Reader(read_video, (folder(sizes),), "", 3),
        "viewport_csv": Reader(read_viewports, (text(rows),), ".csv", 5),
        "viewport_parquet": Reader(read_viewports, tables(_viewports()), ".parquet", 3),
        "dag_parquet": Reader(read_workload, tables(_jobs()), ".parquet", 4),
        "dag_npy": Reader(read_workload, (_published_jobs,), "", 3),
        "throughput_text": Reader(read_throughput, (folder({"a": text(lines), "b": text(lines)}),), "", 1),
        "throughput_parquet": Reader(read_throughput, tables(_trace()), ".parquet", 1.5),
        "experience_pickle": Reader(
            lambda path: list(read_published(path)), tuple(map(_experience, (2, 3, 4, 5))), ".pkl", 2
        ),
        "pool": Reader(read_pool, (_pool,), "", 0.5),
        "pictures": Reader(read_pictures, (_pictures("png"), _pictures("jpg")), "", 0.5),
        "archive": Reader(pick, tuple(map(_archive, ("", "gz", "xz"))), ".tar", 0.5),
        "weights": Reader(read_weights, (_weights,), ".npz", 0.5),
        "checkpoint": Reader(read_checkpoint, (_checkpoint,), ".ckpt", 0.5),
        "yaml": Reader(read_yaml, (text("a: &x {b: [1, 2.5, null]}\nc: *x\nd: 2024-01-02\n<<: *x\n"),), ".yaml", 0.5),
    }
