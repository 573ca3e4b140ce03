"""What goes wrong on good code, too, is told in a line that says what to do: memory, packages, data, folders."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from netllm_pl import errors
from netllm_pl.backbone import BackboneConfig
from netllm_pl.cli import COMMANDS, main
from netllm_pl.errors import UserError, explained
from netllm_pl.run_folder import claim, home_of

ROOT = Path(__file__).parent.parent
VIEWPORT = ROOT / "configs" / "viewport_prediction.yaml"
OVERLAY = ROOT / "configs" / "overlays" / "viewport_prediction" / "no_pictures.yaml"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.2 GiB is free."
)


def failing(*words: str) -> None:
    """Run a command that must fail by what the user can change."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def settings(folder: Path) -> list[str]:
    smoke, tiny = (ROOT / "configs" / name for name in ("overlays/smoke.yaml", "llm/tiny_random.yaml"))
    small = "--data.init_args.synthetic={videos: 4, users: 4, seconds: 30}"
    files = ["--config", str(VIEWPORT), "--config", str(OVERLAY), "--config", str(smoke)]
    return [*files, small, "--model.init_args.backbone", str(tiny), "--run_dir", str(folder)]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run."""
    folder = tmp_path_factory.mktemp("friendly")
    main(["fit", *settings(folder / "run"), "--quiet"])
    return folder / "run"


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate"])
def test_too_little_memory_names_the_settings_that_help(
    command: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr("netllm_pl.backbone.Backbone.forward", full)
    checkpoint = [] if command == "fit" else ["--ckpt_path", str(trained / "best.ckpt")]
    words = [*settings(tmp_path / "run"), *checkpoint]
    if command == "evaluate":
        policies = ["--policies", str(trained / "best.ckpt"), "--out", str(tmp_path)]
        words = ["--config", str(trained / "config.yaml"), *policies]
    failing(command, *words)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "out of memory on the GPU (it has 23.69 GiB, 2.50 GiB more were needed)" in line
    for setting in ("data.batch_size", "data.eval_batch_size", "model.backbone.layers", "backbone.checkpointing"):
        assert setting in line


def test_every_setting_that_is_named_exists() -> None:
    line = explained(torch.OutOfMemoryError("no sizes"))
    assert line is not None and line.startswith("out of memory on the GPU; ")
    for name in ("layers", "checkpointing", "quantize"):
        assert f"backbone.{name}" in line and hasattr(BackboneConfig(), name)


def test_a_cause_is_found_behind_other_errors() -> None:
    outer = RuntimeError("worker failed")
    outer.__cause__ = torch.OutOfMemoryError(OUT_OF_MEMORY)
    assert "out of memory" in str(explained(outer))
    assert explained(RuntimeError("something else")) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_of_the_machine_that_is_short_gets_a_cure(error: Exception) -> None:
    line = str(explained(error))
    assert line.startswith("out of memory; lower data.batch_size") and "\n" not in line


def test_a_full_disk_names_the_file() -> None:
    line = explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/last.ckpt"))
    assert line == (
        "runs/x/last.ckpt: No space left on device; make room, or write elsewhere. What is written is whole"
    )
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing("fit", *settings(tmp_path), "--trainer.accelerator", "gpu")
    assert capsys.readouterr().err.endswith("backend found; trainer.accelerator auto takes what there is\n")


def test_a_place_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").touch()
    failing("evaluate", "--config", str(VIEWPORT), "--policies", "static", "--out", str(tmp_path / "notes"))
    expected = f"error: {tmp_path / 'notes'}/parts: Not a directory; give a place that can be read and written"
    assert capsys.readouterr().err.splitlines()[-1] == expected


# Packages -------------------------------------------------------------------------------------------------------------

REQUIRES = [
    "torch>=2.6",
    "pooch[progress]>=1.8",
    'bitsandbytes>=0.45; extra == "all"',
    'mkdocs>=1.6; extra == "all"',
    "bitsandbytes>=0.45; extra == 'quantize'",
    "scikit-learn; extra == 'quantize'",
]


@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("bitsandbytes", "pip install 'netllm-pl[all]'"),
        ("mkdocs.plugins", "pip install 'netllm-pl[all]'"),
        ("scikit_learn", "pip install 'netllm-pl[quantize]'"),
        ("torch", "pip install netllm-pl"),
        ("pooch", "pip install netllm-pl"),
        ("nobody_knows", "pip install nobody_knows"),
    ],
)
def test_a_missing_package_names_what_to_install(module: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.metadata, "requires", lambda name: REQUIRES)
    line = explained(ModuleNotFoundError(f"No module named '{module}'", name=module))
    assert line is not None and line == f"the module {module.split('.')[0]} is not installed; {cure}"


def test_the_command_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def importing(command: str, words: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'hatchling'", name="hatchling")

    monkeypatch.setitem(COMMANDS, "export", importing)
    failing("export")
    assert capsys.readouterr().err.startswith("error: the module hatchling is not installed; pip install ")


# Names and data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["viewport_prediction", "adaptive_bitrate", "job_scheduling"])
@pytest.mark.parametrize("place", ["--data.data_dir", "--data.init_args.data_dir", "NETLLM_DATA"])
def test_missing_data_name_the_option_and_the_variable(
    config: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option, name, policy = {
        "viewport_prediction": ("--data.dataset", "jin2022", "static"),
        "adaptive_bitrate": ("--data.traces", "fcc", "bba"),
        "job_scheduling": ("--data.workload", "tpch", "fifo"),
    }[config]
    nowhere = [place, str(tmp_path / "nowhere")]
    if place == "NETLLM_DATA":
        monkeypatch.setenv(*nowhere)
        nowhere = []
    path = str(ROOT / "configs" / f"{config}.yaml")
    failing("evaluate", "--config", path, option, name, *nowhere, "--policies", policy, "--out", str(tmp_path))
    text = capsys.readouterr().err
    assert f"{tmp_path}/nowhere/" in text and "does not exist" in text
    assert "data.data_dir" in text and "NETLLM_DATA" in text and "fetch" in text


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["viewport_prediction", "--data.dataset"], "jin2022, synthetic, wu2017. The path of a file or folder"),
        (["adaptive_bitrate", "--data.traces"], "fcc, fcc_synthetic, synthetic. The path of a file or folder"),
        (["job_scheduling", "--data.workload"], "synthetic, tpch. The path of a Parquet file or of a folder"),
    ],
)
def test_an_unknown_data_set_lists_the_known_ones_and_how_to_add_one(
    words: list[str], known: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, option = words
    path = str(ROOT / "configs" / f"{config}.yaml")
    policy = {"viewport_prediction": "static", "adaptive_bitrate": "bba", "job_scheduling": "fifo"}[config]
    failing("evaluate", "--config", path, option, "nothing", "--policies", policy, "--out", str(tmp_path))
    assert known in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ("viewport_prediction", "dataset"),
        ("adaptive_bitrate", "traces"),
        ("adaptive_bitrate", "test_traces"),
        ("adaptive_bitrate", "test_video"),
        ("job_scheduling", "workload"),
        ("throughput_prediction", "traces"),
        ("throughput_prediction", "test_traces"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "benchmark"])
def test_an_unknown_data_set_is_told_before_a_model_is_built(
    command: str,
    config: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def building(*given: Any, **more: Any) -> None:
        raise AssertionError("a language model is built")

    monkeypatch.setattr("netllm_pl.task.NetTask.__init__", building)
    where = ["--run_dir", str(tmp_path)] if command == "fit" else ["--out", str(tmp_path / "x.json")]
    path = str(ROOT / "configs" / f"{config}.yaml")
    failing(command, "--config", path, f"--data.{option}", "there/is/nothing", *where)
    text = capsys.readouterr().err
    assert "there/is/nothing" in text and ("synthetic" in text or "generated" in text)


def test_an_unknown_language_model_lists_the_known_ones_and_how_to_add_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--config", str(VIEWPORT), "--config", str(OVERLAY), "--run_dir", str(tmp_path)]
    failing("fit", *files, "--model.init_args.backbone.name", "smollm2-13b")
    text = capsys.readouterr().err
    assert "'smollm2-13b' cannot be loaded" in text
    assert "Give smollm2-135m, gemma3-270m, a folder with config.json, a .gguf file or a reachable hub id" in text


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["last.ckpt", "best.ckpt", "metrics.csv", "summary.csv"])
def test_a_run_does_not_write_into_the_folder_of_another(file: str, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        claim(folder, None)
        (folder / file).write_text("what was")
    for checkpoint in (None, str(other / "last.ckpt")):
        with pytest.raises(UserError, match="mine holds a run already; give another --run_dir, or "):
            claim(mine, checkpoint)
    assert (mine / file).read_text() == "what was"
    claim(mine, str(mine / "last.ckpt"))


def test_a_run_that_goes_on_stays_in_its_folder(tmp_path: Path) -> None:
    assert home_of(None) is None
    assert home_of(str(tmp_path / "last.ckpt")) is None, "no run"
    (tmp_path / "config.yaml").touch()
    assert home_of(str(tmp_path / "last.ckpt")) == tmp_path
    assert home_of(str(tmp_path / "best.ckpt")) is None, "what came later would be written over"
