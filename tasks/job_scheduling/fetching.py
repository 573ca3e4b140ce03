"""`fetch tpch`: the TPC-H profiles of Decima's public repository, as one Parquet file."""

import hashlib
import re
from pathlib import Path

import numpy as np

from netllm_pl.archive import download, pick_members
from netllm_pl.errors import UserError
from netllm_pl.fetch import SOURCES, Source, refuse_mismatch
from netllm_pl.paths import scratch
from netllm_pl.progress import status
from tasks.job_scheduling.profiles import Profiles, sorted_children
from tasks.job_scheduling.profiles_parquet import write_parquet
from tasks.job_scheduling.published_npy import read_published

COMMIT = "c010dd74ff4b7566bd0ac989c90a32cfbc630d84"
ARCHIVE = f"https://codeload.github.com/hongzimao/decima-sim/tar.gz/{COMMIT}"
"""Decima's simulator (Mao et al., SIGCOMM 2019) at a fixed commit."""
MEMBER = re.compile(r"(?:[\w-]+/)*?(\d{1,3}g/(?:adj_mat|task_duration)_\d{1,2}\.npy)")
SHA256 = "4569ab545b649ff4e2c7d7e639bc164845880d2e9431ba189604b53204cfd6ce"
"""Checksum of the content: that of the archive's bytes would not do, GitHub makes them anew at will."""


def content_sha256(profiles: Profiles) -> str:
    """SHA-256 over jobs in canonical form: by size and query, everything in stored order as 32-bit integers.

    Args:
        profiles: Jobs whose durations are whole milliseconds.
    """
    digest = hashlib.sha256(" ".join(profiles.sizes.tolist()).encode())
    gathered = [
        profiles.durations[start : start + size]
        for start, size in zip(profiles.list_start.ravel().tolist(), profiles.list_size.ravel().tolist(), strict=True)
    ]
    for part in (
        profiles.queries, profiles.stage_start, profiles.child_start, sorted_children(profiles),
        profiles.level_start, profiles.levels, profiles.list_size.ravel(), np.concatenate([[], *gathered]),
    ):  # fmt: skip
        digest.update(part.astype("<i4").tobytes())
    return digest.hexdigest()


def bring(root: Path, url: str) -> Path:
    """Bring the profiles as ``cjs/tpch.parquet``.

    Args:
        root: Folder of the data sets.
        url: The repository's archive, a mirror or local copy of it, or a local folder ``tpch`` as published.

    Raises:
        UserError: If the archive is out of reach or broken, or its jobs are not the published ones.
    """
    target = root / "cjs" / "tpch.parquet"
    if target.is_file():
        return target
    with scratch(target) as place:
        folder = Path(url)
        if not folder.is_dir():
            archive, folder = place / "archive.tar.gz", place / "tpch"
            download(url, archive)
            if not pick_members(archive, MEMBER, folder):
                raise UserError(f"{url} holds no TPC-H profiles: expected files {MEMBER.pattern}.")
        with status("reading tpch"):
            profiles = read_published(folder)
            refuse_mismatch("tpch", content_sha256(profiles), SHA256)
            write_parquet(profiles, target)
    return target


SOURCES["tpch"] = Source("profiles of 154 Spark jobs, 22 TPC-H queries at 7 input sizes (Decima)", bring, ARCHIVE)
