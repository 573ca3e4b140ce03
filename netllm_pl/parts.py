"""Long work in pieces: what was done before an interruption, or by another machine, is not done again."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

from netllm_pl.errors import UserError
from netllm_pl.paths import PARTIAL, locked, publish, scratch
from netllm_pl.progress import status

SAVE_S = 30.0
"""Seconds of work that are lost at most when a process is killed, and the piece that it was at."""
NOTE = "part.json"


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of some work.

    Attributes:
        number: Which one, from 1.
        count: How many there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> "Shard | None":
        """Read ``i/n``; None stays None.

        Raises:
            UserError: It is something else.
        """
        if text is None:
            return None
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"shard is '{text}'; give i/n with i from 1 to n, such as 2/4 for the second of four")
        return cls(int(number), int(count))

    def of(self, pieces: int) -> range:
        """Return the pieces of this share, neighbours."""
        return range(pieces * (self.number - 1) // self.count, pieces * self.number // self.count)


@dataclass
class Section:
    """Neighbouring pieces whose results are written together.

    Attributes:
        folder: Where to write them.
        start: The first piece.
        stop: The piece behind the last one that is done.
    """

    folder: Path
    start: int
    stop: int
    _began: float = field(default_factory=monotonic)

    @property
    def due(self) -> bool:
        """Whether it is time to keep what is done."""
        return monotonic() - self._began >= SAVE_S


class Parts:
    """The results of pieces of some work, in a folder that holds a folder for each section, such as ``000004-000008``.

    Args:
        folder: Where they are; it need not exist.
        settings: All that the results depend on, as JSON can hold it: parts of other work are not mixed in.
        what: What the work is called in messages.
        cure: How to make what is missing, as a message says it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], what: str, cure: str) -> None:
        self.folder, self.what, self.cure = folder, what, cure
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))

    @contextmanager
    def claimed(self, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Keep other processes from the folder, or, if shared, from claiming all of it.

        Args:
            shared: Others may write other pieces meanwhile.
            wait: Wait for the other process, for one that does the same.

        Raises:
            UserError: Another process has it, and is not waited for.
        """
        with ExitStack() as stack:
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                before = self._identity()
                attempt = stack.enter_context(ExitStack())
                owned = attempt.enter_context(locked(self.folder, shared))
                if owned is False:
                    if not wait:
                        raise UserError(f"{self.folder} is in use by another process that writes this {self.what}")
                    with status(f"waiting for another process that writes the same {self.what}"):
                        owned = attempt.enter_context(locked(self.folder, shared, wait=True))
                if before is not None and before == self._identity():
                    break
                attempt.close()  # whoever had it has finished and removed it, and the next one may have made it again
            try:
                yield
            finally:
                if self._identity() == before:  # else it is gone, and one of that name belongs to the next one
                    with suppress(OSError):  # something is in it that is worth keeping
                        self.folder.rmdir()

    def _identity(self) -> int | None:
        """Tell this folder from a later one of its name: a lock of one that was removed keeps nobody out."""
        try:
            return self.folder.stat().st_ino
        except FileNotFoundError:
            return None

    def found(self) -> list[tuple[range, Path]]:
        """Return what is there, in order.

        Raises:
            UserError: It belongs to other work.
        """
        sections = []
        for note, folder in self._notes():
            differs = self._differences(note)
            if differs:
                raise UserError(
                    f"{self.folder} holds parts of another {self.what}, with other settings ({', '.join(differs)}); go"
                    " on with those, or remove the folder"
                )
            sections.append((range(note["start"], note["stop"]), folder))
        return sorted(sections, key=lambda section: section[0].start)

    @property
    def fits(self) -> bool:
        """Whether what is there belongs to this work."""
        return not any(self._differences(note) for note, _ in self._notes())

    def complete(self, pieces: int) -> bool:
        """Whether all pieces of this work are there."""
        return self.folder.is_dir() and self.fits and not self.missing(range(pieces))

    def _notes(self) -> list[tuple[dict[str, Any], Path]]:
        return [(json.loads(file.read_text()), file.parent) for file in sorted(self.folder.glob(f"[!.]*/{NOTE}"))]

    def _differences(self, note: dict[str, Any]) -> list[str]:
        return [name for name, value in self.settings.items() if note["settings"].get(name) != value]

    def missing(self, wanted: range) -> list[range]:
        """Return the pieces that are not there, as ranges."""
        done = {piece for pieces, _ in self.found() for piece in pieces}
        gaps: list[range] = []
        for piece in wanted:
            if piece in done:
                continue
            if gaps and gaps[-1].stop == piece:
                gaps[-1] = range(gaps[-1].start, piece + 1)
            else:
                gaps.append(range(piece, piece + 1))
        return gaps

    @contextmanager
    def section(self, start: int) -> Iterator[Section]:
        """Give a folder for the results of pieces from ``start`` on; it counts when the body has set ``stop``.

        Nothing is kept of a section that ends with an error.
        """
        with scratch(self.folder / f"{start:06d}") as place:
            section = Section(place, start, start)
            yield section
            if section.stop > start:
                note = {"start": start, "stop": section.stop, "settings": self.settings}
                (place / NOTE).write_text(json.dumps(note, indent=1) + "\n")
                publish(place, self.folder / f"{start:06d}-{section.stop:06d}")

    def whole(self, pieces: int) -> list[Path]:
        """Return the folders of all pieces, in order.

        Raises:
            UserError: Some are missing, or there twice.
        """
        gaps = self.missing(range(pieces))
        if gaps:
            listed = ", ".join(f"{gap.start + 1} to {gap.stop}" for gap in gaps[:3]) + (", ..." if gaps[3:] else "")
            raise UserError(
                f"{self.folder} lacks {sum(map(len, gaps))} of {pieces} pieces of this {self.what} ({listed}); "
                f"{self.cure}"
            )
        found = self.found()
        for (before, _), (after, folder) in pairwise(found):
            if after.start < before.stop:
                raise UserError(f"{folder} holds pieces of this {self.what} that are there already; remove it")
        return [folder for _, folder in found]

    def forget(self) -> None:
        """Remove the folder and what is in it, all at once: half of it would look like an interruption."""
        if self.folder.is_dir():
            hidden = self.folder.with_name(f".{self.folder.name}.{uuid4().hex[:8]}{PARTIAL}")
            self.folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
