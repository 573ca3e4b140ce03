"""`fetch jin2022` and `fetch wu2017`: the viewport data of NetLLM's public repository, one Parquet file each."""

import hashlib
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from netllm_pl.archive import download, pick_members
from netllm_pl.errors import UserError
from netllm_pl.fetch import SOURCES, Source, refuse_mismatch
from netllm_pl.paths import scratch
from netllm_pl.progress import status
from tasks.viewport_prediction.traces import Traces, read_traces, write_traces

COMMIT = "ee4d8726898610e4ae7df08bdd26728cafb4701f"
ARCHIVE = f"https://codeload.github.com/duowuyms/NetLLM/tar.gz/{COMMIT}"
"""NetLLM (Wu et al., SIGCOMM 2024, MIT) at a fixed commit."""

ROW = np.dtype(
    [("video", "<i2"), ("user", "<i2"), ("t", "<f4"), ("roll", "<f4"), ("pitch", "<f4"), ("yaw", "<f4")], align=False
)
"""One sample in the canonical form that the checksum is over: seconds and degrees."""

MEMBERS = {
    "jin2022": re.compile(r"viewport_prediction/data/viewports/Jin2022/(video\d{1,3}/5Hz/simple_5Hz_user\d{1,3}\.csv)"),
    # the published splits use videos 1-9 only
    "wu2017": re.compile(r"viewport_prediction/data/viewports/Wu2017/(video[1-9]/5Hz/simple_5Hz_user\d{1,3}\.csv)"),
}
SHA256 = {
    "jin2022": "1825e4edd3a798e41287c6072aeda83c1f24b2f38e9f7d69a1aad6862eb6b672",
    "wu2017": "a0a57d36ec49072e46f0b1660d43c57addef8337ef4c46fe2d1216da823c055b",
}
"""Checksums of the content: those of the archive's bytes would not do, GitHub makes them anew at will."""


def content_sha256(traces: Traces) -> str:
    """SHA-256 over the samples in canonical form: traces by the numbers of video and user, samples in given order.

    Args:
        traces: Traces whose videos and users are numbers.
    """
    video, user = traces.video.astype(np.int16), traces.user.astype(np.int16)
    digest = hashlib.sha256()
    for trace in np.lexsort((user, video)):
        span = slice(traces.starts[trace], traces.starts[trace + 1])
        rows = np.empty(span.stop - span.start, ROW)
        rows["video"], rows["user"], rows["t"] = video[trace], user[trace], traces.times[span]
        rows["roll"], rows["pitch"], rows["yaw"] = traces.angles[span].T
        digest.update(rows.tobytes())
    return digest.hexdigest()


def bring(name: str, root: Path, url: str) -> Path:
    """Bring one of the data sets as ``viewport/<name>.parquet``.

    Args:
        name: ``jin2022`` or ``wu2017``.
        root: Folder of the data sets.
        url: The repository's archive, or a mirror or local copy of it.

    Raises:
        UserError: If the archive is out of reach or broken, or its samples are not the published ones.
    """
    target = root / "viewport" / f"{name}.parquet"
    if target.is_file():
        return target
    with scratch(target) as place:
        archive, folder = place / "archive.tar.gz", place / name
        download(url, archive)
        with status(f"reading {name}"):
            if not pick_members(archive, MEMBERS[name], folder):
                raise UserError(f"{url} holds no traces of {name}: expected files {MEMBERS[name].pattern}.")
            with warnings.catch_warnings(action="ignore"):  # oddities of the published data are as published
                traces = read_traces(folder)
            refuse_mismatch(name, content_sha256(traces), SHA256[name])
            write_traces(traces, target)
    return target


SOURCES["jin2022"] = Source(
    "viewports of 84 viewers on 27 videos at 5 Hz (NetLLM, MIT)", partial(bring, "jin2022"), ARCHIVE
)
SOURCES["wu2017"] = Source(
    "viewports of 48 viewers on 9 videos at 5 Hz (NetLLM, MIT)", partial(bring, "wu2017"), ARCHIVE
)
