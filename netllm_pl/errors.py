"""The one exception for mistakes of the user, which the command line prints without a traceback; and known failures."""

import errno
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import metadata

LONGEST = 1500
"""Characters of a message: what a broken file holds in place of a name may be long."""


class UserError(ValueError):
    """A file, key or value that the user gave is wrong; the message names it and the cure in one or two lines.

    Args:
        message: May quote a file: what is not printable, such as what moves a terminal's cursor, is written out.
    """

    def __init__(self, message: str) -> None:
        shown = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
        if not shown.isprintable():
            shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)
        super().__init__(shown)


class Terminated(BaseException):
    """The process was asked to end by SIGTERM, as clusters, containers and `kill` do it."""


def unknown(kind: str, name: str, known: Iterable[str], cure: str = "") -> UserError:
    """Build the error for a name that is not among the known ones.

    Args:
        kind: What the name stands for, such as ``policy``.
        name: What the user gave.
        known: The names that would have worked.
        cure: A last sentence, such as how to add one.
    """
    names = sorted(known)
    name = name if len(name) <= 80 else f"{name[:80]}..."
    near = get_close_matches(name, names, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    listed = ", ".join(names) or "none"
    return UserError(f"unknown {kind} '{name}'.{guess} Known: {listed}.{' ' + cure if cure else ''}")


def at_least(least: float, place: str = "", **values: float | None) -> None:
    """Refuse numbers that are too small, by name.

    Args:
        least: The smallest one that is possible.
        place: What stands before the name, such as ``data.``.
        values: The numbers; null is none.

    Raises:
        UserError: One is smaller, or not a number.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{place}{name} is {value}; it must be at least {least}")


def explained(error: BaseException) -> str | None:
    """Say in one line what to do about a failure that is no bug: memory, a full disk, a place, a missing package.

    Returns:
        None if it is neither.
    """
    for cause in _causes(error):
        if type(cause).__name__ == "OutOfMemoryError":  # torch's; it is not imported for its name
            return _out_of_memory(str(cause))
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in _REFUSED):
            return (
                "out of memory; lower data.batch_size or data.eval_batch_size, --parallel of collect, or "
                "data.num_workers, or let other programs end. What is written is whole: the same command goes on"
            )
        if isinstance(cause, OSError) and cause.errno in _FULL:
            place = f"{cause.filename}: " if cause.filename else ""
            return f"{place}{cause.strerror}; make room, or write elsewhere. What is written is whole"
        if isinstance(cause, OSError) and cause.errno in _BARRED and cause.filename:
            return f"{cause.filename}: {cause.strerror}; give a place that can be read and written"
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return _missing(cause.name.partition(".")[0])
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BARRED = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
_REFUSED = ("DefaultCPUAllocator: can't allocate memory", "can't start new thread")
"""Words of PyTorch and of Python's threads for what is a MemoryError elsewhere."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _out_of_memory(message: str) -> str:
    sizes = re.search(r"Tried to allocate ([\d.]+ \w+).*?total capacity of ([\d.]+ \w+)", message)
    where = f" (it has {sizes[2]}, {sizes[1]} more were needed)" if sizes else ""
    return (
        f"out of memory on the GPU{where}; lower data.batch_size (fit) or data.eval_batch_size, set "
        "model.backbone.checkpointing to true (fit), set model.backbone.quantize, or keep fewer model.backbone.layers"
    )


def _missing(module: str) -> str:
    """Name the extra that brings a module; of several the smallest one."""
    extras: dict[str, set[str]] = {}
    try:
        for line in metadata.requires("netllm-pl") or []:
            extra = re.search(r"extra == ['\"]([\w-]+)", line)
            name = re.split(r"[^\w.-]", line)[0]
            extras.setdefault(extra[1] if extra else "", set()).add(name.replace("-", "_").lower())
    except metadata.PackageNotFoundError:  # run from a clone that is not installed
        pass
    found = sorted((len(names), extra) for extra, names in extras.items() if module.lower() in names)
    package = f"'netllm-pl[{found[0][1]}]'" if found and found[0][1] else "netllm-pl" if found else module
    return f"the module {module} is not installed; pip install {package}"
