"""What the videos show: equirectangular pictures with the times at which they appear."""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netllm_pl.errors import UserError
from netllm_pl.parquet import first_line, refuse_more_than_memory

FORMATS = ("PNG", "JPEG")
"""Told by content: of others that Pillow knows, one starts a program, whatever the file is called."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of several videos.

    Attributes:
        pixels: (N, h, w, 3) uint8, yaw -180..180 from left to right, pitch 90..-90 from top to bottom.
        ids: (N,) int64, a hash of each picture's content: the key of the feature cache.
        video: (N,) labels.
        seconds: (N,) when each picture appears, rising within a video.
    """

    pixels: np.ndarray
    ids: np.ndarray
    video: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray, video: np.ndarray, seconds: np.ndarray) -> "Pictures":
        """Build from pictures sorted by video and time."""
        digests = [hashlib.blake2b(picture.tobytes(), digest_size=8).digest() for picture in pixels]
        ids = np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
        return cls(pixels, ids, video, seconds)

    @classmethod
    def regular(cls, pixels: np.ndarray, every: float) -> "Pictures":
        """Build from (videos, frames, h, w, 3) at a fixed interval in seconds; videos are called 1, 2, ..."""
        videos, frames = pixels.shape[:2]
        labels = np.repeat([str(video + 1) for video in range(videos)], frames)
        return cls.of(pixels.reshape(-1, *pixels.shape[2:]), labels, np.tile(np.arange(frames) * every, videos))

    def at(self, video: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Find what is shown: for video (B,) and seconds (B, P) the rows (B, P) of the latest pictures by then."""
        rows = np.zeros(seconds.shape, dtype=np.int64)
        for label in np.unique(video):
            own = np.flatnonzero(self.video == label)
            if own.size == 0:
                raise UserError(f"there are no pictures of video {label}; add a folder of that name or drop the video")
            here = video == label
            # Half a millisecond forgives time stamps stored as float32.
            place = np.searchsorted(self.seconds[own], seconds[here] + 5e-4, side="right") - 1
            rows[here] = own[np.clip(place, 0, own.size - 1)]
        return rows


def read_pictures(folder: Path) -> Pictures:
    """Read <folder>/<video>/<seconds>.png (or .jpg); all pictures must be of one size."""
    from PIL import Image

    files = [file for file in folder.glob("*/*") if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not files:
        raise UserError(f"no pictures in {folder}; expected <video>/<seconds>.png, such as 1/0.png, 1/0.2.png")
    try:
        keyed = sorted((file.parent.name, float(file.stem), file) for file in files)
        if strange := [file for _, seconds, file in keyed if not np.isfinite(seconds)]:
            raise UserError(f"{strange[0]}: its name is no time in seconds; expected <video>/<seconds>.png")
        sizes = {Image.open(file, formats=FORMATS).size for _, _, file in keyed}  # reads no pixels
        if len(sizes) > 1:
            raise UserError(f"pictures in {folder} have different sizes {sorted(sizes)}; scale them to one")
        (size,) = sizes
        refuse_more_than_memory(str(folder), 3.0 * size[0] * size[1] * len(keyed), f"{len(keyed)} pictures of {size}")
        pixels = np.stack([np.asarray(Image.open(file, formats=FORMATS).convert("RGB")) for _, _, file in keyed])
    except UserError:
        raise
    # what is broken in a picture raises nearly anything, and one of 179 million pixels is refused by Pillow
    except (Image.DecompressionBombError, ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError,
            struct.error, zlib.error, MemoryError) as error:  # fmt: skip
        raise UserError(
            f"pictures in {folder}: {first_line(error)}; expected readable <video>/<seconds>.png"
        ) from error
    return Pictures.of(pixels, np.array([k[0] for k in keyed]), np.array([k[1] for k in keyed]))
