"""Where the package keeps what it fetched, and how it writes: under a temporary name first, renamed when complete."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PARTIAL = ".partial"
"""Suffix of folders in which something is being written."""


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


def weights_of(names: Iterable[str], published: Path | None = None) -> dict[str, str]:
    """SHA-256 of what policies are read from.

    Args:
        names: Of policies. One that is a file, such as a checkpoint, is read; of a folder the weights in it.
        published: Folder of published weights, ``NAME.npz``.
    """
    found: dict[str, str] = {}
    for name in names:
        path = Path(name)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if published is not None:
            files.append(published / f"{name.removesuffix('_argmax')}.npz")
        found |= {str(file): file_sha256(file) for file in files if file.is_file()}
    return found


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a name to write to; put the file in its place on success, remove it on failure.

    Whoever is killed leaves the old file, or none, and a hidden folder that the next writer beside it clears away.

    Args:
        path: The file to write; its folder is made. An existing file stays whole until the new one is complete, and on
            the disk.

    Yields:
        A file of the same name in a hidden folder.
    """
    with scratch(path) as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; rename it to ``path`` on success, remove it on failure.

    A folder that stands at ``path`` by then stays: whoever finished first has written the same content.

    Args:
        path: The folder to make.

    Yields:
        The folder to fill.
    """
    with scratch(path) as folder:
        yield folder
        publish(folder, path)


def publish(folder: Path, path: Path) -> None:
    """Rename a folder that is complete, once all of it is on the disk; one that stands at ``path`` stays."""
    for place, _, files in os.walk(folder):
        for name in (*files, ""):
            _sync(Path(place, name))
    try:
        os.replace(folder, path)
    except OSError:
        if not path.is_dir():
            raise
    _sync(path.parent)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Give a new hidden folder beside a file or folder that is to be, and remove it in the end.

    It is locked as long as its process lives; those of processes that were killed are cleared away on the way. Where
    the file system has no locks they stay.

    Args:
        path: What is written; the folder it lies in is made, and removed again if nothing is left in it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for dead in path.parent.glob(f".*{PARTIAL}"):
        with locked(dead) as owned:
            if owned:
                shutil.rmtree(dead, ignore_errors=True)
    while True:
        folder = path.with_name(f".{path.name}.{uuid4().hex[:8]}{PARTIAL}")
        folder.mkdir(parents=True)  # another process may have removed what it had made
        with locked(folder) as owned:
            if owned is False or not folder.is_dir():  # another process took it for a dead one in this very moment
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # not empty
                    for empty in made:
                        empty.rmdir()
            return


@contextmanager
def locked(folder: Path, shared: bool = False, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder against other processes, until this one ends at the latest.

    Args:
        folder: It exists.
        shared: Others may have a shared lock, too.
        wait: Wait until it can be locked.

    Yields:
        True if it could be, False if another process has it, None where there are no locks or there is no folder.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # gone; or Windows, which opens no folders
        yield None
        return
    try:
        yield _lock(handle, shared, wait)
    finally:
        os.close(handle)


def _lock(handle: int, shared: bool, wait: bool) -> bool | None:
    import fcntl  # not on Windows, where this line is not reached

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: a rename may else outlive a power failure, and data not."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
