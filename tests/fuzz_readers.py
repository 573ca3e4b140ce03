"""Mutates valid files, and lets every reader read them: it must give data, or the one-line error that names the file.

``python tests/fuzz_readers.py --inputs 1000000`` shares a million inputs out to the readers, in processes of its own
whose death, hang or hunger is a finding, and prints counts; ``--only NAME --start N --inputs 1`` does one again.
Mutations depend on the name of a reader and the number of the input alone.
"""

import argparse
import faulthandler
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent.parent))

from valid_files import Reader, readers

from netllm_pl.errors import UserError

SECONDS = 10
"""A reader that takes longer over a file of a few kilobytes hangs."""
MEGABYTES = 400
"""A reader that takes more for it at once blows up."""
PART = 20_000
"""Inputs of one process."""

# Mutations ------------------------------------------------------------------------------------------------------------

WORDS = [
    *b"nan inf -1 1e999 1e-320 0 null true {} 18446744073709551616 2147483648 0x10 1_000 \xd9\xa3 \xff\xfe".split(),
    *b"&a|[*a]|*x|!!python/object/apply:os.system [x]|../../x|/etc/passwd|'|,|\x00| ||\n".split(b"|"),
    *(b"9" * 5000, b"[" * 3000, b"1" + b"0" * 400, b"a" * 200),
    *(struct.pack("<q", value) for value in (-1, 2**31, 2**40, 2**62)),
    *(struct.pack("<I", value) for value in (0, 1, 2**16, 2**31, 2**32 - 1)),
    *(b"\xff\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x08", b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
]
"""What breaks readers; the last are numbers as Parquet's footers write them."""


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Change a file in one to five places, cut it off, or make it up."""
    if rng.random() < 0.01:
        return rng.randbytes(rng.randrange(200))
    content = bytearray(body)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        # half of the changes go to the last quarter: that is the footer of Parquet, and the central directory of ZIP
        low = 3 * len(content) // 4 if rng.random() < 0.5 else 0
        at, kind = rng.randrange(low, len(content) + 1), rng.randrange(8)
        size = min(rng.choice((1, 1, 2, 4, 8, 30)), len(content) - at)
        if kind == 0 and size:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at : at + size]
        elif kind == 3:
            content[at:at] = content[at : at + size] * rng.choice((1, 1, 3, 1000))
        elif kind == 4:
            content[at:at] = rng.choice(WORDS)
        elif kind == 5:
            word = rng.choice(WORDS)
            content[at : at + len(word)] = word
        elif kind == 6:
            other = rng.randrange(len(content) + 1)
            content[at : at + size] = content[other : other + size]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content[: 2**17])


class Fuzzed:
    """A reader with valid files of its own, from which inputs are made.

    Args:
        name: Of the reader.
        reader: What reads.
        scratch: An empty folder.
    """

    def __init__(self, name: str, reader: Reader, scratch: Path) -> None:
        self.name, self.reader, self.valid = name, reader, []
        for number, write in enumerate(reader.writes):
            path = scratch / f"{name}-{number}{reader.suffix}"
            files = write(path)
            self.valid.append((path, [(file, file.read_bytes()) for file in files]))

    @contextmanager
    def input(self, number: int) -> Iterator[Path]:
        """Make an input."""
        rng = random.Random(f"{self.name} {number}")
        path, files = rng.choice(self.valid)
        file, body = rng.choice(files)
        file.write_bytes(self._consistent(path, file, mutated(body, rng)))
        try:
            yield path
        finally:
            file.write_bytes(body)
            if self.name == "pool":
                (path / "manifest.json").write_bytes(dict(files)[path / "manifest.json"])

    def _consistent(self, path: Path, file: Path, body: bytes) -> bytes:
        """Let the manifest of a pool tell sizes and checksums of files as they are: whoever forges one can do so."""
        if self.name == "pool" and file.suffix == ".parquet":
            manifest = json.loads((path / "manifest.json").read_text())
            for part in (manifest["episode_table"], *manifest["shards"]):
                if part["file"] == file.name:
                    part |= {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            (path / "manifest.json").write_text(json.dumps(manifest))
        return body

    def check(self, number: int) -> str:
        """Read an input; return ``data``, ``refused``, or what is wrong."""
        with self.input(number) as path, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                with deadline(SECONDS):
                    self.reader.read(path)
                found = "data"
            except UserError as error:
                message = str(error)
                found = "refused"
                if str(path.parent) not in message and path.name not in message:
                    found = f"the message does not name the file: {message[:200]}"
                if len(message.splitlines()) > 2 or len(message) > 2000:
                    found = f"the message is long: {message[:200]!r}"
            except TimeoutError:
                found = f"takes more than {SECONDS} s"
            except (Exception, SystemExit) as error:
                found = f"{type(error).__name__}: {str(error)[:200]} at {_place(error)}"
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            return found if taken < MEGABYTES else f"takes {taken:.0f} MB ({found[:60]})"


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if "netllm_pl" in file.parts or "tasks" in file.parts or "site-packages" not in str(file):
            place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes too long."""

    def late(signum: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError

    # time of the processor: a busy machine makes no reader hang
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# The loop -------------------------------------------------------------------------------------------------------------


def fuzz(name: str, reader: Reader, start: int, count: int, counts: Counter[str]) -> Iterator[tuple[int, str]]:
    """Read inputs in processes of their own; give the number of each finding, and what it is.

    Args:
        name: Of the reader.
        reader: What reads.
        start: Number of the first input.
        count: Inputs.
        counts: Counts ``data``, ``refused`` and ``finding``.
    """
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        os.environ["NETLLM_CACHE"] = str(Path(scratch) / "cache")
        fuzzed, shared, end = Fuzzed(name, reader, Path(scratch)), mmap.mmap(-1, 8), start + count
        while start < end:
            part = min(PART, end - start)
            source, sink = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(source)
                faulthandler.disable()
                told: Counter[str] = Counter()
                findings: list[tuple[int, str]] = []
                for number in range(start, start + part):
                    shared[:8] = struct.pack("<q", number)
                    if number % 512 == 0:
                        _clear(Path(scratch) / "cache")
                    found = fuzzed.check(number)
                    told[found if found in ("data", "refused") else "finding"] += 1
                    if found not in ("data", "refused"):
                        findings.append((number, found))
                with os.fdopen(sink, "w") as stream:
                    json.dump([told, findings[:1000]], stream)
                os._exit(0)
            os.close(sink)
            with os.fdopen(source) as stream:
                answer = stream.read()
            _, status = os.waitpid(child, 0)
            if answer and status == 0:
                told, findings = json.loads(answer)
                counts.update(told)
                yield from (tuple(finding) for finding in findings)
                start += part
            else:  # what came before the deadly input is counted when it is read again
                (last,) = struct.unpack("<q", shared[:8])
                if last > start:
                    yield from fuzz(name, reader, start, last - start, counts)
                counts["finding"] += 1
                yield last, f"the process ended with status {status}"
                start = last + 1


def _clear(cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)


def main() -> None:
    """Fuzz, and print a line a reader and a line a kind of finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--only", help="name of one reader")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    known = readers()
    chosen = {name: reader for name, reader in known.items() if options.only in (None, name)}
    whole = sum(reader.share for reader in chosen.values())
    total: Counter[str] = Counter()
    for name, reader in chosen.items():
        began, counts = time.monotonic(), Counter[str]()
        kinds: dict[str, list[int]] = {}
        for number, what in fuzz(name, reader, options.start, round(options.inputs * reader.share / whole), counts):
            kinds.setdefault(what, []).append(number)
        seconds = time.monotonic() - began
        print(f"{name}: {sum(counts.values())} inputs in {seconds:.0f} s, {dict(counts)}", flush=True)
        for what, numbers in sorted(kinds.items(), key=lambda item: -len(item[1]))[:20]:
            print(f"  {len(numbers)} x (such as {numbers[0]}): {what}", flush=True)
        total.update(counts)
    print(f"{sum(total.values())} inputs: {dict(total)}")
    if total["finding"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
