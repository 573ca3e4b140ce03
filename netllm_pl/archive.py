"""Picks files out of public archives: download with a progress bar, then only the members that are asked for."""

import lzma
import math
import re
import shutil
import tarfile
import zlib
from contextlib import ExitStack
from pathlib import Path

from netllm_pl.errors import UserError
from netllm_pl.progress import Advance, progress

LARGEST = 2**26
"""Bytes of a member: the published ones have a few millions at most."""


def download(url: str, file: Path) -> None:
    """Download a URL to a file, with a progress bar on a terminal; a path of a local file is copied.

    Raises:
        UserError: If the address cannot be reached or answers with an error.
    """
    if Path(url).is_file():
        shutil.copyfile(url, file)
        return
    import pooch  # both take half a second to import
    import requests

    try:
        with ExitStack() as stack:
            pooch.HTTPDownloader(progressbar=_Megabytes(url, stack), timeout=60)(url, str(file), None)
    except (requests.RequestException, OSError, ValueError) as error:
        raise UserError(
            f"cannot download {url}: {_first_line(_reason(error))}\n"
            "Go online, or name a mirror or a copy of the archive on this machine with --url."
        ) from error


class _Megabytes:
    """What pooch tells of a download that goes on.

    Args:
        url: What is downloaded.
        stack: Takes the bar, which is shown when the length is known.
    """

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.total = 0  # bytes; pooch sets it, to 0 where the server does not tell, as GitHub's does not
        self._text, self._stack, self._over = f"MB of {url.rpartition('/')[2]}", stack, False
        self._advance: Advance | None = None

    def update(self, amount: int) -> None:
        """Count bytes."""
        if self._advance is None:
            self._advance = self._stack.enter_context(progress(self._text, self.total / 1e6 or math.inf))
        if not self._over:
            self._advance(amount / 1e6)

    def reset(self) -> None:
        """End: pooch then tells the whole once more."""
        self._over = True

    def close(self) -> None:
        """Leave what is shown to whoever shows it."""


def pick_members(archive: Path, wanted: re.Pattern[str], folder: Path) -> int:
    """Extract the regular files of a tar archive whose path matches a pattern.

    Nothing else of the archive touches the disk: links, devices and paths that leave the folder are refused even if
    they match.

    Args:
        archive: A tar file, compressed or not.
        wanted: Matched against each member's whole path without the archive's first folder. Its one group is the path
            to write: ``data/(video1/user1.csv)`` writes ``video1/user1.csv`` in the folder.
        folder: Where to write.

    Returns:
        How many files were written.

    Raises:
        UserError: If the archive is broken or a member that matches is unsafe.
    """
    count = 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                match = wanted.fullmatch(member.name.partition("/")[2])
                if match is None:
                    continue
                _write(tar, member, folder / match[1])
                count += 1
    except UserError:
        raise
    # numbers in headers may be anything, and a header may ask for another, and that for another
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError, lzma.LZMAError,
            zlib.error) as error:  # fmt: skip
        raise UserError(
            f"{archive.name} is not a whole tar archive: {_first_line(error)}. Download it again."
        ) from error
    return count


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one member's bytes under a name that the caller's pattern made."""
    stream = tar.extractfile(member) if member.isreg() else None
    if stream is None or ".." in Path(member.name).parts or ".." in target.parts:
        raise UserError(
            f"the archive's member {member.name} is a link or leaves the folder: refused. Use another mirror."
        )
    if member.size > LARGEST:
        raise UserError(f"the archive's member {member.name} has {member.size} bytes: refused. Use another mirror.")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(stream.read())


def _reason(error: Exception) -> Exception:
    """What urllib3 gave up on; what requests says of it is a line of nested brackets."""
    found = getattr(next(iter(error.args), None), "reason", None)
    return found if isinstance(found, Exception) else error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
