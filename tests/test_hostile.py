"""Nothing that is read as data or weights runs code, ends the process, or takes memory that its size does not promise.

Each crafted file would leave a canary behind if code in it ran. `tests/fuzz_readers.py` breaks files at random.
"""

import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from netllm_pl import parquet, unpickle
from netllm_pl.archive import pick_members
from netllm_pl.backbone import Backbone, BackboneConfig
from netllm_pl.checkpoint import KEY, load_task
from netllm_pl.cli import main
from netllm_pl.compare import read_run
from netllm_pl.errors import UserError
from netllm_pl.multi_task import MultiTask
from netllm_pl.plain_yaml import load_yaml
from netllm_pl.sources import read_yaml
from netllm_pl.unpickle import read_npy, read_pickle
from netllm_pl.weights import read_weights
from tasks.adaptive_bitrate.trace_text import packets_to_bandwidth
from tasks.adaptive_bitrate.traces import read_traces
from tasks.job_scheduling.workloads import read_workload
from tasks.viewport_prediction.pictures import read_pictures
from tasks.viewport_prediction.traces import read_traces as read_viewports

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A folder that crafted files would make; it must not be there in the end."""
    folder = tmp_path / "executed"
    yield folder
    assert not folder.exists()


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def peak_of(read: Callable[[], object], message: str) -> int:
    """Bytes that a reader takes until it refuses."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Pickles --------------------------------------------------------------------------------------------------------------

NUMPY = b"cnumpy.core.multiarray\n_reconstruct\n"
LAUGHS = b"(lq\x00" + b"".join(b"0](" + b"h%c" % k * 200 + b"eq%c" % (k + 1) for k in range(8)) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"c_codecs\nencode\nN}U\x0c__defaults__(I1\nI2\nts\x86b.", "it changes a function"),
        (b"cnumpy\nndarray\nN}U\x0c__setstate__c_codecs\nencode\ns\x86b.", "it changes a type"),
        (b"}()" + b"\x85" * 50_000 + b"K\x01u.", "a key that is a tuple"),
        (b")" + b"\x85" * 50_000 + b".", "more than 32 containers"),
        (b"]q\x00h\x00a.", "or one that holds itself"),
        (LAUGHS, "repeat their parts until they are 2.57e.18 numbers"),
        (b"\x96\x00\x00\x00\x00\x10\x00\x00\x00.", "."),
        (b"\x8e\x00\x00\x00\x00\x10\x00\x00\x00.", "."),
        (b"\x95\x00\x00\x00\x00\x10\x00\x00\x00.", "."),
        (b"\x8b\x00\x00\x01\x00" + b"\x01" * 2**16 + b".", "more than 64 bits"),
        (NUMPY + b")R.", "an array without content"),
        (b"\x8f.", "KeyError: 143"),
        (b"\x82\x01.", "KeyError: 130"),
        (b"Pname\n.", "KeyError: 80"),
    ],
    ids=["defaults", "setstate", "keys", "deep", "itself", "laughs", "bytearray", "bytes", "frame", "long",
         "empty", "set", "extension", "persistent"],
)  # fmt: skip
def test_a_pickle_takes_no_more_than_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(content)
    assert peak_of(lambda: read_pickle(file), message) < 60e6
    assert unpickle._encode.__defaults__ == ("latin1",)


def test_what_a_pickle_numbers_takes_no_table(tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(b"Nr\x00\x00\x00\x7f.")  # None gets the number 2,130,706,432
    tracemalloc.start()
    assert read_pickle(file) is None
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_sizes_of_arrays_are_not_believed(tmp_path: Path) -> None:
    for shape in ((2**40,), (2**62, 2**62), (0, -1), (-2, -3)):
        file, header = tmp_path / "x.npy", io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
        file.write_bytes(header.getvalue() + b"\0" * 48)
        assert peak_of(lambda file=file: read_npy(file), "an array of shape") < 1e6  # type: ignore[misc]


# Weights --------------------------------------------------------------------------------------------------------------


def test_archives_of_weights_hold_plain_arrays_only(tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, first=np.array([Runs(canary)], dtype=object))
    with pytest.raises(UserError, match=r"not an archive of plain NumPy arrays \(refused: it asks for posix.mkdir"):
        read_weights(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        for _ in range(17):
            member.write(bytes(2**24))  # 285 MB in 280 kB
    assert peak_of(lambda: read_weights(file), r"a\.npy has 285212672 bytes") < 1e6


def evil_model(folder: Path, canary: Path) -> dict[str, Any]:
    """A folder with a model that brings code of its own, and a backbone of it."""
    folder.mkdir()
    code = {"AutoConfig": "code.LlamaConfig", "AutoModel": "code.LlamaModel"}
    (folder / "config.json").write_text(json.dumps(TINY | {"model_type": "llama", "auto_map": code}))
    imports = "from transformers import LlamaConfig, LlamaModel\n"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n{imports}")
    return {"name": str(folder), "pretrained": False}


def test_settings_in_a_checkpoint_cannot_run_code(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by code that comes with a model, nor by naming a class whose module is then imported."""
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil_module.Evil\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = evil_model(tmp_path / "model", canary)
    tiny = {"name": "llama", "pretrained": False, "config": TINY, "lora": None}
    named = {"class_path": "evil_module.Evil", "init_args": {}}
    for settings, message in (
        ({"backbone": {**model, "config": {"trust_remote_code": True}}}, "code that comes with a model is never run"),
        ({"backbone": tiny, "optimizer": named}, "the stored setting class_path is 'evil_module.Evil'"),
        ({"backbone": {**tiny, "lora": named}}, "the stored setting class_path"),
        ({"backbone": tiny, "optimizer": str(tmp_path / "evil.yaml")}, "the stored setting optimizer is"),
        ({"backbone": tiny, "optimizer": "evil_module.Evil"}, "the stored setting optimizer is"),
        (named, "the stored setting class_path"),
        ({"backbone": {**tiny, "config": {**TINY, "vocab_size": 2**62}}}, "the stored settings do not fit|config does"),
    ):
        stored = {"task": "ViewportPrediction", "init_args": settings, "frozen": {}}
        torch.save({KEY: stored, "state_dict": {}}, tmp_path / "x.ckpt")
        (tmp_path / "exported").mkdir(exist_ok=True)
        (tmp_path / "exported" / "config.yaml").write_text(yaml.safe_dump(stored))
        for path in (tmp_path / "x.ckpt", tmp_path / "exported"):
            with pytest.raises(UserError, match=message):
                load_task(path)
    stored = {"task": "evil_module.Evil", "init_args": {}, "frozen": {}}
    torch.save({KEY: stored, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"unknown task 'evil_module\.Evil'"):
        load_task(tmp_path / "x.ckpt")


def test_code_beside_a_model_is_not_run(tmp_path: Path, canary: Path) -> None:
    assert Backbone(BackboneConfig(**evil_model(tmp_path / "model", canary), lora=None)).d_model == 16


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate", "export"])
def test_no_command_runs_code_of_a_checkpoint(
    command: str, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({KEY: {"task": "ViewportGRU", "init_args": {}, "frozen": {}}, "x": Runs(canary)}, tmp_path / "x.ckpt")
    words = ["--model", "ViewportGRU", "--data", "ViewportPredictionData", "--run_dir", str(tmp_path / "run")]
    words += ["--ckpt_path", str(tmp_path / "x.ckpt"), "--trainer.accelerator", "cpu"]
    if command == "evaluate":
        words = ["--data", "ViewportPredictionData", "--policies", str(tmp_path / "x.ckpt"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([command, *([str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "y")] if command == "export" else words)])
    assert "x.ckpt cannot be read: it is broken or no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{KEY: []}, {KEY: {"task": 1, "init_args": {}, "frozen": {}}}, {"state_dict": [1]}, {"state_dict": {"a": "b"}},
     {KEY: {"task": "ViewportGRU", "init_args": [], "frozen": {}}}],
)  # fmt: skip
def test_a_checkpoint_of_other_things_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    whole = {KEY: {"task": "ViewportGRU", "init_args": {}, "frozen": {}}, "state_dict": {}}
    torch.save(whole | change, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt is broken: what it says of its task and weights"):
        load_task(tmp_path / "x.ckpt")


# YAML -----------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TAGS = (
    "!!python/object/apply:os.mkdir [CANARY]",
    "!!python/object/new:os.mkdir [CANARY]",
    "!!python/name:os.mkdir CANARY",
    "!!python/module:antigravity",
)


def reads_yaml(folder: Path, text: str) -> list[Callable[[], object]]:
    """Everything that reads YAML, given a text."""
    for name in ("config.yaml", "task.yaml"):
        (folder / name).write_text(text)
    return [
        lambda: load_task(folder),
        lambda: read_run(folder),
        lambda: read_yaml(folder / "config.yaml"),
        lambda: MultiTask(None, [str(folder / "task.yaml")]),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("text", [f"a: {tag}" for tag in TAGS] + [BOMB, "[" * 600, "a: &a [*a]", "a: 2024-13-45"])
def test_yaml_is_data(text: str, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for read in reads_yaml(tmp_path, text.replace("CANARY", str(canary))):
        with pytest.raises(UserError, match=r"(config|task)\.yaml"):
            read()
    for command in (["fit"], ["evaluate", "--policies", "static"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--config", str(tmp_path / "config.yaml")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "config.yaml" in error and len(error.splitlines()) <= 2


def test_plain_yaml_reads_what_yaml_reads() -> None:
    for text in ("", "a: 1\nb: [x, 2.5, null, 2024-01-02]", "a: &x {b: 1}\nc: {<<: *x, d: [*x, *x]}", "just text"):
        assert load_yaml(text) == yaml.safe_load(text)


# Archives -------------------------------------------------------------------------------------------------------------


def member(name: str, size: int = 0, **more: Any) -> tarfile.TarInfo:
    """A member of an archive."""
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in more.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (member("r/../../../executed/1.csv"), "leaves the folder"),
        (member("r/a/../../executed/1.csv"), "leaves the folder"),
        (member("r/1.csv", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (member("r/1.csv", type=tarfile.LNKTYPE, linkname="r/2.csv"), "is a link"),
        (member("r/1.csv", type=tarfile.FIFOTYPE), "is a link"),
        (member("r/1.csv", 2**40, pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40)}), "7776 bytes"),
    ],
)  # fmt: skip
def test_what_leaves_an_archives_folder_is_refused(
    entry: tarfile.TarInfo, message: str, tmp_path: Path, canary: Path
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry)
        tar.fileobj.write(bytes(1024))  # type: ignore[union-attr]
    out = tmp_path / "out"
    taken = peak_of(lambda: pick_members(tmp_path / "x.tar", re.compile(r"(.*\.csv)"), out), message)
    assert taken < 5e6 and not out.exists()


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_memory_could_not_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million equal rows take a few kilobytes in Parquet."""
    file, count = tmp_path / "x.parquet", 300_000
    zeros = pa.array(np.zeros(count))
    names = pa.array(["a"] * count).dictionary_encode()
    columns = {name: zeros for name in ("time_s", "bandwidth_mbps", "t", "roll", "pitch", "yaw")}
    lists = {name: pa.array([[[1.0]]] * 9) for name in ("first", "fresh", "rest")}
    pq.write_table(pa.table(columns | dict.fromkeys(("trace_name", "video", "user"), names)), file)
    assert file.stat().st_size < 30_000
    jobs = {"size": ["2g"] * 9, "query": [1] * 9, "stage": range(9), "children": [[]] * 9, "levels": [[5]] * 9}
    pq.write_table(
        pa.table({name: pa.array(list(values)) for name, values in jobs.items()} | lists), tmp_path / "j.parquet"
    )
    monkeypatch.setattr(parquet, "memory_bytes", lambda: 500)
    for read, path in ((read_traces, file), (read_viewports, file), (read_workload, tmp_path / "j.parquet")):
        peak = peak_of(
            lambda read=read, path=path: read(path), r"rows take [\d,.]+ GB, more than half of this machine's"
        )
        assert peak < 1e6
    assert parquet.memory_bytes() == 500


def test_the_machines_memory_is_known() -> None:
    assert 2**28 < parquet.memory_bytes() < 2**46


def test_a_thousand_packets_in_a_millisecond_are_not_a_million(tmp_path: Path) -> None:
    times = np.ones(10_000, dtype=np.int64)  # repeated 1000 times until they fill a second
    tracemalloc.start()
    samples = packets_to_bandwidth(times)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    assert samples.tolist() == [[0, 120_000], [1, 120_000]]


def test_pictures_are_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n")
    assert Image.open(folder / "0.png").format == "EPS"  # Pillow would start Ghostscript for its pixels
    with pytest.raises(UserError, match="cannot identify image file"):
        read_pictures(tmp_path)
    Image.new("1", (2**15, 2**14)).save(folder / "0.png")  # 67 kB of 537 million pixels
    assert peak_of(lambda: read_pictures(tmp_path), "exceeds limit|decompression bomb") < 5e6
    Image.new("RGB", (30, 20)).save(folder / "0.png")
    monkeypatch.setattr(parquet, "memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"1 pictures of \(30, 20\) take"):
        read_pictures(tmp_path)
    (folder / "0.png").rename(folder / "nan.png")
    with pytest.raises(UserError, match=r"nan\.png: its name is no time"):
        read_pictures(tmp_path)


def test_messages_do_not_move_the_cursor() -> None:
    assert str(UserError("file '\x1b[2Jx\x07\u2028'\nsecond line")) == "file '\\x1b[2Jx\\x07\\u2028'\nsecond line"
    assert len(str(UserError("x" * 10**6))) < 2000


def test_pickles_that_are_plain_are_read_as_before(tmp_path: Path) -> None:
    """Against Python's own reader, in all protocols."""
    plain = {"a": [1, 2.5, None, True, "text", b"bytes", (1, 2)], 3: {"b": []}, "big": 2**40}
    for protocol in range(6):
        file = tmp_path / "x.pkl"
        file.write_bytes(pickle.dumps(plain, protocol))
        assert read_pickle(file) == plain
