"""The promise that a task is one folder and one YAML, kept by writing one; and that the core knows no task."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]

TOY = '''
"""Predicts the next value of a sine."""

from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MetricCollection

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import NetDataModule
from netllm_pl.encoders import SeriesEncoder
from netllm_pl.evaluate import Metric
from netllm_pl.heads import RegressionHead
from netllm_pl.task import NetTask, OptimizerConfig, Prompt


class SineForecast(NetTask):
    """Reads eight values and gives the next.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
    """

    monitor = "val/mae"

    def __init__(self, backbone: BackboneConfig, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(backbone, optimizer)
        self.series = SeriesEncoder(1, self.backbone.d_model)
        self.head = RegressionHead(self.backbone.d_hidden, 1)

    def encode(self, batch):
        tokens = self.series(batch["past"])
        return Prompt(tokens.values, torch.tensor([tokens.values.shape[1] - 1]))

    def answer(self, hidden, batch):
        return batch["past"][:, -1] + self.head(hidden)[:, 0]

    def loss(self, prediction, batch):
        return nn.functional.l1_loss(prediction, batch["next"])

    def build_metrics(self):
        return MetricCollection({"mae": MeanAbsoluteError()})

    def update_metrics(self, metrics, prediction, batch):
        metrics.update(prediction, batch["next"])


class Hold:
    """Answers with the last value."""

    def __call__(self, batch):
        return batch["past"][:, -1]


class SineWindows:
    def __init__(self, seed: int) -> None:
        start = np.random.default_rng(seed).uniform(0, 6.3, (64, 1))
        self.values = torch.tensor(np.sin(start + 0.5 * np.arange(9)), dtype=torch.float32)[..., None]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, indices):
        values = self.values[indices]
        return {"past": values[:, :8], "next": values[:, 8]}


class SineForecastData(NetDataModule):
    """Sines of random phase."""

    baselines: ClassVar = {"hold": Hold}
    metrics = (Metric("mae", "mae"),)
    compared = ("hold",)

    def dataset(self, split):
        return SineWindows({"train": 0, "valid": 1, "test": 2}[split])

    def episodes(self, policy):
        data = self.dataset("test")
        batch = data[list(range(len(data)))]
        with torch.no_grad():
            error = (policy(batch) - batch["next"]).abs()[:, 0].numpy()
        return pd.DataFrame({"window": np.arange(len(data)), "cluster": np.arange(len(data)), "mae": error})
'''

YAML = """
model:
  class_path: SineForecast
  init_args:
    backbone: {name: gpt2, pretrained: false, config: {n_embd: 16, n_layer: 1, n_head: 2, vocab_size: 8}}
    optimizer: {lr: 1.0e-2}
data:
  class_path: SineForecastData
  init_args: {batch_size: 16}
trainer: {max_epochs: 8, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the three packages with one more task: a folder and a YAML, and nothing else touched."""
    for package in ("netllm_pl", "tasks", "callbacks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tasks" / "sine_forecast").mkdir()
    (tmp_path / "tasks" / "sine_forecast" / "__init__.py").write_text(TOY)
    (tmp_path / "sine_forecast.yaml").write_text(YAML)
    return tmp_path


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NETLLM_CACHE": str(tree / "cache"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "netllm_pl", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=110)


def test_a_new_task_is_a_folder_and_a_yaml(tree: Path) -> None:
    done = run(tree, "fit", "--config", "sine_forecast.yaml", "--run_dir", "run")
    assert done.returncode == 0, done.stderr
    assert "hold" in done.stdout and "best.ckpt" in done.stdout and "mae" in done.stdout
    table = pd.read_csv(tree / "run" / "summary.csv").set_index("policy")
    assert list(table.index) == ["hold", "run/best.ckpt"] and set(table["n"]) == {64}
    assert table.loc["run/best.ckpt", "mean"] < 0.8 * table.loc["hold", "mean"]
    assert table.loc["run/best.ckpt", "paired_low"] > 0


def test_the_core_imports_no_task() -> None:
    files = sorted((ROOT / "netllm_pl").rglob("*.py"))
    assert len(files) > 10
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                first = node.args[0]
                names += [str(first.value)] if isinstance(first, ast.Constant) else []
            found += [(file.name, name) for name in names if name.split(".")[0] == "tasks"]
    assert found == [("discovery.py", "tasks")]  # by which all of them are found
