"""Which traces and which video a name in a config stands for."""

import hashlib
from pathlib import Path

import numpy as np

from netllm_pl.data import SPLITS
from netllm_pl.errors import UserError, unknown
from tasks.adaptive_bitrate.simulator import Traces, Video
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.traces import leak_free_split, published_split, read_traces, select
from tasks.adaptive_bitrate.videos import generated_video, read_video

HELD_OUT = 0.15
"""Share of the sources of traces given by one path that goes to valid, and to test."""


def named_traces(name: str, split: str, root: Path, published: bool, synthetic: SyntheticTraces) -> Traces:
    """Return the traces of a split.

    Args:
        name: ``synthetic``, ``fcc``, ``fcc_synthetic``, or a path; `AdaptiveBitrateData` says what each is.
        split: train, valid or test.
        root: Folder that holds abr/.
        published: Whether ``fcc`` is split as published, or without leaks.
        synthetic: The generator's settings.

    Raises:
        UserError: The name is unknown, or its files are missing or broken.
    """
    if name == "synthetic":
        return generate(synthetic, split)
    path = _place(name, split, root)
    if name == "fcc_synthetic" and split == "test":
        return read_traces(path)
    if name in ("fcc", "fcc_synthetic"):
        return (published_split if published else leak_free_split)(root, split)
    own = [path / f"{split}.parquet", path / split]
    if any(place.exists() for place in own):
        return read_traces(next(place for place in own if place.exists()))
    return _dealt(read_traces(path), split, path)


def check_traces(name: str, root: Path) -> None:
    """Refuse a name of traces that is unknown, or whose files are not there, without reading any.

    Raises:
        UserError: It is.
    """
    for split in SPLITS if name != "synthetic" else ():
        _place(name, split, root)


def _place(name: str, split: str, root: Path) -> Path:
    """Where traces that are not generated lie: of public ones the file of a split."""
    if name in ("fcc", "fcc_synthetic"):
        part = "synthetic" if (name, split) == ("fcc_synthetic", "test") else split
        return _public(root / "abr" / f"traces_{part}.parquet")
    path = Path(name).expanduser()
    if not path.exists():
        raise unknown("traces", name, ("synthetic", "fcc", "fcc_synthetic"), "The path of a file or folder is one too.")
    return path


def all_traces(name: str, root: Path, synthetic: SyntheticTraces) -> Traces:
    """Return the traces of a name that is only tested on: of a path all there are."""
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and not any((path / part).exists() for part in ("test.parquet", "test"))):
        return read_traces(path)
    return named_traces(name, "test", root, False, synthetic)


def named_video(name: str, root: Path) -> Video:
    """Return a video.

    Args:
        name: ``generated``, a name in abr/videos.json, or a path; FILE:NAME chooses one of a JSON file.
        root: Folder that holds abr/.

    Raises:
        UserError: There is no such video, or its file is broken.
    """
    if name == "generated":
        return generated_video()
    path = Path(name).expanduser()
    if path.exists():
        return read_video(path)
    file, colon, inner = name.rpartition(":")
    if colon and Path(file).expanduser().is_file():
        return read_video(Path(file).expanduser(), inner)
    if len(path.parts) > 1:  # no name of a video: a path that does not exist
        raise unknown("video", name, ("generated",), "The path of a JSON file or of a folder of size files is one too.")
    return read_video(_public(root / "abr" / "videos.json"), name)


def _public(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist (`fetch` does not bring it); set data.data_dir or NETLLM_DATA to the folder that "
            "holds abr/, or take --data.traces synthetic --data.video generated"
        )
    return path


def _dealt(traces: Traces, split: str, path: Path) -> Traces:
    """Deal the sources of traces out to the splits, in an order that depends on their names alone."""
    order = sorted(set(traces.sources.tolist()), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if len(order) < 3:
        raise UserError(
            f"{path} holds traces of {len(order)} source(s), too few to split; add more, or give a folder with train, "
            "valid and test in it, or name it as data.test_traces"
        )
    few = max(1, round(HELD_OUT * len(order)))
    parts = {"test": order[:few], "valid": order[few : 2 * few], "train": order[2 * few :]}
    return select(traces, np.nonzero(np.isin(traces.sources, parts[split]))[0])
