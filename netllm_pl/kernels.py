"""Compiled functions whose cache on disk knows all sources that they are made of."""

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

IMPORTED = re.compile(r"^[ \t]*(?:from|import)[ \t]+((?:netllm_pl|tasks|callbacks)\b[\w.]*)", re.MULTILINE)
"""Modules of our own that a source imports; `njit` looks no further than these."""


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function with numba and keep the machine code on disk, as ``numba.njit(cache=True)`` does.

    Machine code holds what the function calls, constants and layouts of tuples, from whatever file; numba takes it for
    fresh while the function's own file is the same. Here, all modules of ours that this file imports, and those import,
    and so on, must be the same. numba keeps the code in ``__pycache__``, where that is read-only in the user's cache,
    and where there is none to write to, functions are compiled in every process.

    Args:
        options: Of ``numba.njit``.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
            # No public name: numba's own stamp is the hash of one file.
            dispatcher._cache._cache_file._source_stamp = sources_stamp(function)
        except (RuntimeError, AttributeError, OSError):  # no folder to write to; NUMBA_DISABLE_JIT; no source file
            dispatcher = numba.njit(**options)(function)
        return dispatcher

    return compiled


def sources_stamp(function: Callable[..., Any]) -> str:
    """Return a hash of the sources that a function can be made of."""
    file = Path(function.__code__.co_filename).resolve()
    root = file.parents[function.__module__.count(".")]
    digest = hashlib.sha256()
    for source in sorted(_closure(file, root)):
        digest.update(f"{source.relative_to(root)}\n".encode() + _read(source)[0])
    return digest.hexdigest()


def _closure(file: Path, root: Path) -> set[Path]:
    """A module and all of our own that it imports, directly or not."""
    found, open_ = {file}, [file]
    while open_:
        for name in _read(open_.pop())[1]:
            new = _files(root.joinpath(*name.split("."))) - found
            found |= new
            open_ += new
    return found


def _files(place: Path) -> set[Path]:
    """Files of a module; all of a package, whose names may come from any; none of what is not there."""
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    return {file for file in files if file.is_file()}


def _read(file: Path) -> tuple[bytes, tuple[str, ...]]:
    """Content of a source, and the modules that it imports."""
    known = file.stat()
    return _parsed(file, known.st_mtime_ns, known.st_size)


@functools.cache
def _parsed(file: Path, changed_ns: int, size: int) -> tuple[bytes, tuple[str, ...]]:
    content = file.read_bytes()
    return content, tuple(IMPORTED.findall(content.decode()))
