"""Two runs of a shipped config on one machine end with the same metrics and weights, bit by bit.

Nightly, as it takes ten minutes: `NETLLM_NIGHTLY=1 pytest tests/test_repeat.py`. Each run is a process of its own, with
another order of Python's sets and an empty cache; configs are small as in `tests/test_cli.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from test_cli import CONFIGS, EPISODES, SMALL, TINY

from netllm_pl.compare import read_curves

NIGHTLY = os.environ.get("NETLLM_NIGHTLY", "0") != "0"
ROOT = Path(__file__).parents[1]
ALONE = {
    "viewport_prediction": ["no_lora", "no_pictures", "published"],
    "adaptive_bitrate": ["published_tokens"],
    "job_scheduling": [],
}
"""Overlays that run on generated data."""
PUBLIC = {
    "viewport_prediction": ["jin2022", "jin2022 undisturbed", "jin2022 published", "jin2022 trim30", "jin2022 unseen2"],
    "baselines/viewport_prediction_gru": ["jin2022_baseline"],
    "adaptive_bitrate": ["fcc", "fcc gpu", "fcc published_protocol", "fcc synthetic_test", "fcc video2"],
    "job_scheduling": ["tpch", "tpch gpu"],
}
"""Overlays on public data, one behind the other; others change what is tested only."""
STEPS = ["--trainer.max_steps", "4", "--trainer.limit_train_batches", "4"]


def cases() -> list[tuple[str, str]]:
    """Configs, and names of their overlays."""
    plain = [(str(file.relative_to(ROOT / "configs").with_suffix("")), "") for file in CONFIGS]
    overlaid = [(config, names) for kind in (ALONE, PUBLIC) for config, more in kind.items() for names in more]
    return [*plain, ("multi_task", ""), *overlaid]


def words(config: str, overlays: str) -> list[str]:
    """Command line of a small run."""
    file = ROOT / "configs" / f"{config}.yaml"
    tree = yaml.safe_load(file.read_text())
    folder = Path(config).name.replace("_gru", "")
    files = [file, *(ROOT / "configs" / "overlays" / folder / f"{name}.yaml" for name in overlays.split())]
    found = [
        part for path in [*files, ROOT / "configs" / "overlays" / "smoke.yaml"] for part in ("--config", str(path))
    ]
    found += [*SMALL.get(tree["data"]["class_path"], []), *STEPS]
    found += EPISODES if tree["data"]["init_args"].get("experience") else []
    return [*found, *(["--model.init_args.backbone", str(TINY)] if "backbone" in tree["model"]["init_args"] else [])]


@pytest.mark.skipif(not NIGHTLY, reason="nightly: set NETLLM_NIGHTLY=1")
@pytest.mark.parametrize(("config", "overlays"), cases())
def test_two_runs_end_alike(config: str, overlays: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if overlays in PUBLIC.get(config, []):
        variables["NETLLM_DATA"] = str(request.getfixturevalue("little_data"))
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        own = {"PYTHONHASHSEED": str(number), "NETLLM_CACHE": str(tmp_path / f"cache{number}")}
        command = [
            sys.executable,
            "-m",
            "netllm_pl",
            "fit",
            *words(config, overlays),
            "--quiet",
            "--run_dir",
            str(folder),
        ]
        done = subprocess.run(command, cwd=ROOT, env=variables | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (read_curves(folder).filter(regex="^(?!cost/)") for folder in folders)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one.filter(regex="^(train|val)/").notna().any().all() and len(one) > 0
    for summary in sorted(folders[0].rglob("summary.csv")):
        tables = [pd.read_csv(folder / summary.relative_to(folders[0])) for folder in folders]
        for table, folder in zip(tables, folders, strict=True):
            table["policy"] = table["policy"].str.removeprefix(str(folder))
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_every_overlay_is_run_or_only_for_tests() -> None:
    """So that a new one is not forgotten: what is not named here must say that it is for `evaluate`."""
    for folder in ("viewport_prediction", "adaptive_bitrate", "job_scheduling"):
        lists = [names for kind in (ALONE, PUBLIC) for config, names in kind.items() if folder in config]
        named = {name for names in lists for overlays in names for name in overlays.split()}
        for file in (ROOT / "configs" / "overlays" / folder).glob("*.yaml"):
            assert file.stem in named or "unseen" in file.stem, file
