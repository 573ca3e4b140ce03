"""Videos: what chunk sizes a client may choose from; read from JSON or size files, or generated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError, unknown
from tasks.adaptive_bitrate.simulator import Video

PUBLISHED_LADDER = (300, 750, 1200, 1850, 2850, 4300)
"""Kbit/s of the video that Pensieve streams."""
CHUNKS = 49
CHUNK_S = 4.0
SIZE_FILE = "video_size_"
DIGITS = 15
"""Of a chunk's bytes, at most."""
KEYS = {"bitrate_kbps", "chunk_s", "chunk_bytes"}


def read_video(
    path: Path, name: str | None = None, ladder_kbps: Sequence[int] | None = None, chunk_s: float = CHUNK_S
) -> Video:
    """Read a video.

    Args:
        path: A JSON file ``{name: {"bitrate_kbps": [L], "chunk_s": seconds, "chunk_bytes": [L][chunks]}}``, or
            one video without a name, which is that of the file; or a folder of the published size files
            ``video_size_0`` (lowest level), ``video_size_1``, ..., one integer a line.
        name: Which of a JSON file's videos; not needed if it holds one. A folder's video is called like the folder.
        ladder_kbps: (L,) nominal bitrates for size files; the published ones if there are six levels.
        chunk_s: Seconds a chunk plays, for size files.

    Raises:
        UserError: Something is missing or makes no video; the message names file and key or line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"video path {path} does not exist; give a JSON file or a folder of {SIZE_FILE}0, ...")
    if path.is_dir():
        return _read_folder(path, name, ladder_kbps, chunk_s)
    try:
        videos = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:100]}); expected {{name: {{bitrate_kbps: ...}}}}") from error
    if isinstance(videos, dict) and KEYS & videos.keys():
        videos = {path.stem: videos}
    if not isinstance(videos, dict) or not videos or not all(isinstance(v, dict) for v in videos.values()):
        raise UserError(f"{path}: expected an object of videos by name, each with bitrate_kbps, chunk_s, chunk_bytes")
    if name is None:
        if len(videos) > 1:
            raise UserError(f"{path}: holds {len(videos)} videos; name one of {', '.join(sorted(videos))}")
        name = next(iter(videos))
    if name not in videos:
        raise unknown("video", name, videos, "'generated' and paths of JSON files or folders of size files do, too.")
    where, video = f"{path}, video {name}", videos[name]
    if missing := [key for key in ("bitrate_kbps", "chunk_bytes") if key not in video]:
        raise UserError(f"{where}: missing {', '.join(missing)}; found {', '.join(video) or 'nothing'}")
    if strange := sorted(set(video) - KEYS):
        raise unknown("key", strange[0], KEYS, f"It is in {where}.")
    return make_video(name, video["bitrate_kbps"], video["chunk_bytes"], video.get("chunk_s", CHUNK_S), where)


def make_video(name: str, ladder_kbps: Any, chunk_bytes: Any, chunk_s: Any, where: str = "") -> Video:
    """Build a video from what a file holds, checked.

    Args:
        name: What it is called.
        ladder_kbps: (L,) positive, ascending.
        chunk_bytes: (L, chunks) positive.
        chunk_s: Seconds a chunk plays.
        where: Begins the message of an error.

    Raises:
        UserError: A value is out of its range.
    """
    where = where or f"video {name}"
    if not isinstance(chunk_s, int | float) or isinstance(chunk_s, bool) or not 0 < chunk_s < float("inf"):
        raise UserError(f"{where}: chunk_s is {chunk_s}; expected seconds above 0")
    if not isinstance(ladder_kbps, Sequence | np.ndarray) or isinstance(ladder_kbps, str) or not len(ladder_kbps):
        raise UserError(f"{where}: bitrate_kbps is {ladder_kbps}; expected a list of bitrates in kbit/s")
    ladder = _integers(ladder_kbps, f"{where}: bitrate_kbps")
    if (np.diff(ladder) <= 0).any():
        raise UserError(f"{where}: bitrate_kbps is {ladder.tolist()}; expected ascending bitrates")
    if not isinstance(chunk_bytes, Sequence | np.ndarray) or len(chunk_bytes) != len(ladder):
        count = len(chunk_bytes) if isinstance(chunk_bytes, Sequence | np.ndarray) else "no"
        raise UserError(f"{where}: chunk_bytes has {count} lists; expected {len(ladder)}, one a bitrate")
    sizes = [_integers(row, f"{where}: chunk_bytes, level {level}") for level, row in enumerate(chunk_bytes)]
    counts = [len(row) for row in sizes]
    if len(set(counts)) > 1 or counts[0] < 2:
        raise UserError(f"{where}: levels have {counts} chunks; expected the same number, at least 2")
    return Video(name, ladder, np.ascontiguousarray(np.stack(sizes, axis=1)), float(chunk_s))


def generated_video(seed: int = 0) -> Video:
    """Make a video with the published ladder: 49 chunks of 4 s with a variable bitrate.

    A chunk's sizes vary by 10 percent around nominal with what it shows, alike at all levels, and by 3 percent at each
    level alone. Equal seeds give equal videos.
    """
    rng = np.random.default_rng(seed)
    scene = 0.1 * rng.standard_normal(CHUNKS) + 0.03 * rng.standard_normal((len(PUBLISHED_LADDER), CHUNKS))
    nominal = np.array(PUBLISHED_LADDER)[:, None] * 1000.0 / 8.0 * CHUNK_S
    sizes = nominal * np.exp(np.clip(scene, -0.4, 0.4))
    return make_video("generated", PUBLISHED_LADDER, np.rint(sizes).astype(np.int64), CHUNK_S)


def _read_folder(path: Path, name: str | None, ladder_kbps: Sequence[int] | None, chunk_s: float) -> Video:
    count = sum(1 for file in path.iterdir() if file.name.startswith(SIZE_FILE))
    if not count:
        raise UserError(f"{path}: holds no size files; expected {SIZE_FILE}0, {SIZE_FILE}1, ...")
    files = [path / f"{SIZE_FILE}{level}" for level in range(count)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path}: has {count} size files, but {file.name} is missing")
    if ladder_kbps is None:
        if count != len(PUBLISHED_LADDER):
            raise UserError(
                f"{path}: has {count} levels, and only six have published bitrates; write the video as JSON, with "
                "bitrate_kbps, chunk_s and chunk_bytes"
            )
        ladder_kbps = PUBLISHED_LADDER
    sizes = [_read_sizes(file) for file in files]
    return make_video(name or path.name, ladder_kbps, sizes, chunk_s, str(path))


def _read_sizes(path: Path) -> list[int]:
    sizes = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        if not line.strip().isdecimal() or len(line.strip()) > DIGITS:
            raise UserError(f"{path}, line {number}: '{line.strip()[:60]}'; expected a whole number of bytes")
        sizes.append(int(line.strip()))
    return sizes


def _integers(values: Any, what: str) -> npt.NDArray[np.int64]:
    """Return positive whole numbers (K,)."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros((0, 0))
    if numbers.ndim != 1:
        raise UserError(f"{what} is {str(values)[:60]}; expected a list of positive whole numbers")
    bad = ~((numbers > 0) & (numbers < 2**53) & (numbers == np.floor(numbers)))
    if bad.any():
        place = int(bad.argmax())
        raise UserError(f"{what}[{place}] is {values[place]}; expected a positive whole number")
    return numbers.astype(np.int64)
