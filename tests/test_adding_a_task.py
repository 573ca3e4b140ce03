"""The guide on adding a task shows every file of the task, and its commands run."""

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_documentation import blocks

from netllm_pl.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding_a_task.md"
BLOCKS = blocks("docs/adding_a_task.md")


def test_the_guide_shows_each_file_of_the_task() -> None:
    files = {*(ROOT / "tasks" / "throughput_prediction").glob("*.py"), ROOT / "configs" / "throughput_prediction.yaml"}
    assert {ROOT / file for _, file, _ in BLOCKS if file} == files
    assert all(f"`{file.relative_to(ROOT)}`" in GUIDE.read_text() for file in files)
    lines = sum(len(file.read_text().splitlines()) for file in files if file.suffix == ".py")
    assert f"{lines} lines of Python" in GUIDE.read_text()


def test_the_commands_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.DataFrame({"time_s": 5.0 * np.arange(40), "bandwidth_mbps": np.linspace(1, 2, 40)})
    (tmp_path / "abr").mkdir()
    for split, numbers in (("train", range(30)), ("test", range(30, 35))):
        traces = [rows.assign(trace_name=f"trace_{number}_x") for number in numbers]
        pd.concat(traces).to_parquet(tmp_path / "abr" / f"traces_{split}.parquet")
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    smoke = ["--config", f"{ROOT}/configs/overlays/smoke.yaml"]
    tiny = ["--model.init_args.backbone", f"{ROOT}/configs/llm/tiny_random.yaml"]
    commands = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert len(commands) == 3
    for command in commands:
        text = command.replace("$NETLLM_DATA", str(tmp_path)).replace(" configs/", f" {ROOT}/configs/")
        start, words = shlex.split(text)[:3], shlex.split(text)[3:]
        assert start == ["python", "-m", "netllm_pl"]
        main([*words, *(smoke + tiny if words[0] == "fit" else [])])
        assert "linear" in capsys.readouterr().out
    for folder in ("runs/throughput", "runs/throughput_fcc", "results/throughput"):
        policies = pd.read_csv(tmp_path / folder / "summary.csv")["policy"].unique()
        assert len(policies) == 4 and {"last", "harmonic", "linear"} < set(policies)
