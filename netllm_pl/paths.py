"""Where the package keeps what it fetched, and how it writes: under a temporary name first, renamed when complete."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def cache_dir() -> Path:
    """Folder for what can be made again: backbones, picture features, data sets.

    ``NETLLM_CACHE`` names it; otherwise it is the user's cache folder of the operating system.
    """
    chosen = os.environ.get("NETLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import pooch  # imported late: the command line asks for no folder before it answers --help

    return Path(pooch.os_cache("netllm_pl"))


def data_root(data_dir: str | None = None) -> Path:
    """Folder of the data sets: the argument, else ``NETLLM_DATA``, else ``data`` in the cache."""
    chosen = data_dir or os.environ.get("NETLLM_DATA")
    return Path(chosen).expanduser() if chosen else cache_dir() / "data"


def weights_folder(chosen: str | None, root: Path) -> Path | None:
    """Folder of published weights: as chosen, else ``weights`` in or beside that of the data sets."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return next((place for place in (root / "weights", root.parent / "weights") if place.is_dir()), None)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of a file; rename it to the file on success, remove it on failure.

    Args:
        path: The file to write; its folder is made. An existing file stays whole until the new one is complete.

    Yields:
        The name to write to, with the suffix of the file.
    """
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; rename it to ``path`` on success, remove it on failure.

    A folder that stands at ``path`` by then stays: whoever finished first has written the same content.

    Args:
        path: The folder to make.

    Yields:
        The folder to fill.
    """
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, which is made: a rename is atomic only within one file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{uuid4().hex[:8]}{path.suffix}")
