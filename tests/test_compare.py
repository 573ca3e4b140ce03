"""Several runs in one table and one picture, as far as they can be read."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import imread

from netllm_pl.cli import main
from netllm_pl.compare import compare, differences, read_curves, read_run
from netllm_pl.errors import UserError
from netllm_pl.metrics_file import MetricsFile

ROOT = Path(__file__).parent.parent


def run_of(folder: Path, lr: float = 1e-3, task: str = "ViewportGRU", **model: Any) -> Path:
    """Write what a run of six steps leaves behind; the metric that it monitors is best at step 4."""
    folder.mkdir(parents=True)
    tree = {
        "seed_everything": 0,
        "run_dir": str(folder),
        "model": {"class_path": f"tasks.some.{task}", "init_args": {"optimizer": {"lr": lr}, **model}},
        "data": {"class_path": "tasks.some.Data", "init_args": {"batch_size": 4}},
        "trainer": {"max_steps": 6, "default_root_dir": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    nothing = np.nan
    columns = {
        "epoch": [0] * 6,
        "step": range(6),
        "train/loss": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0],
        "val/mae_deg": [nothing, 12.0, nothing, 10.0, nothing, 11.0],
        "val/qoe": [nothing, 1.0, nothing, 3.0, nothing, 2.0],
        "lr": [lr] * 6,
    }
    pd.DataFrame(columns).to_csv(folder / "metrics.csv", index=False)
    note = {"finished": True, "steps": 6, "train_s": 61.0, "parameters": 1000, "trained_parameters": 25}
    (folder / "run.json").write_text(json.dumps(note))
    summary = pd.DataFrame({
        "policy": ["static", str(folder / "best.ckpt")],
        "metric": ["mae_deg", "mae_deg"],
        "mean": [14.0, 10.5],
        "low": [13.0, 9.5],
        "high": [15.0, 11.5],
    })  # fmt: skip
    summary.to_csv(folder / "summary.csv", index=False)
    return folder


def test_runs_are_compared_by_what_makes_them_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # some runners of tests set it to less
    runs = [run_of(tmp_path / "runs" / "slow"), run_of(tmp_path / "runs" / "fast", lr=1e-2, width=64)]
    main(["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert f"wrote compare.csv, compare.png in {tmp_path / 'out'}" in text
    for shown in ("val/mae_deg 10 at step 4, 11", "mae_deg 10.5 [9.5, 11.5]", "2.50 %", "6 steps in 61 s", "width: 64"):
        assert shown in text, shown
    table = pd.read_csv(tmp_path / "out" / "compare.csv").set_index("run")
    assert list(table.columns[-2:]) == ["model.optimizer.lr", "model.width"], "nothing else differs"
    assert table.loc["slow", "model.optimizer.lr"] == 1e-3 and np.isnan(table.loc["slow", "model.width"])
    row = table.loc["fast"]
    found = row[["task", "steps", "train_s", "trainable_share", "monitor", "best", "best_step", "last", "test/mae_deg"]]
    assert found.tolist() == ["ViewportGRU", 6, 61.0, 0.025, "val/mae_deg", 10.0, 4, 11.0, 10.5]


def test_a_metric_of_which_more_is_better(tmp_path: Path) -> None:
    row = read_run(run_of(tmp_path / "run", task="AdaptiveBitrate")).row()
    assert (row["monitor"], row["best"], row["best_step"], row["last"]) == ("val/qoe", 3.0, 4, 2.0)


def test_a_task_that_is_gone_is_compared_by_its_loss(tmp_path: Path) -> None:
    row = read_run(run_of(tmp_path / "run", task="Forgotten")).row()
    assert (row["task"], row["monitor"], row["best"]) == ("Forgotten", "val/loss", None)


def test_the_picture_has_an_axis_for_each_metric_and_a_line_for_each_run(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "one"), run_of(tmp_path / "two")
    compare([one], tmp_path / "first")
    compare([one, two], tmp_path / "second")
    pictures = [imread(tmp_path / name / "compare.png") for name in ("first", "second")]
    for picture in pictures:
        assert picture.shape[0] > 300 and picture.shape[1] == 1800, "three metrics, side by side"
        colours = [np.abs(picture[..., :3] - np.array(rgb) / 255).sum(-1) < 0.02 for rgb in ((31, 119, 180),)]
        assert all(colour.any() for colour in colours)
    orange = np.abs(pictures[1][..., :3] - np.array([255, 127, 14]) / 255).sum(-1) < 0.02
    thirds = np.array_split(orange, 3, axis=1)
    assert all(part.any() for part in thirds), "the second run is on all three axes"


def test_what_cannot_be_read_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    run_of(runs / "good")
    (run_of(runs / "broken") / "config.yaml").write_text("model: [")
    (run_of(runs / "text") / "config.yaml").write_text("just words")
    (run_of(runs / "begun") / "metrics.csv").unlink()
    (run_of(runs / "cut") / "metrics.csv").write_text('epoch,step\n0,"1')
    (run_of(runs / "strange") / "metrics.csv").write_text("a,b\n1,2\n")
    (run_of(runs / "half") / "run.json").write_text('{"finished": tr')
    (runs / "empty").mkdir()
    (runs / "stray").touch()
    main(["compare", *map(str, sorted(runs.iterdir())), "--out", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [Path(line.split()[2]).name for line in lines] == [
        "begun", "broken", "cut", "empty", "half", "strange", "stray", "text",
    ]  # fmt: skip
    told = dict(zip(("begun", "broken"), lines, strict=False))
    assert told["begun"].endswith("has logged nothing yet: no metrics.csv")
    assert told["broken"].endswith("cannot be read: broken YAML in config.yaml")
    assert pd.read_csv(tmp_path / "out" / "compare.csv")["run"].tolist() == ["good"]


def test_nothing_to_compare_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"error: no run to compare: {tmp_path}/nowhere is no run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_did_not_end_is_compared_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "killed")
    (folder / "run.json").unlink()
    (folder / "summary.csv").unlink()
    table = compare([folder, folder], tmp_path / "out")
    assert f"not finished: {folder}" in capsys.readouterr().out
    assert len(table) == 1 and not table.loc[0, "finished"] and table.loc[0, "best"] == 10.0


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,0.5\n1,0.25\n2,0.1")
    assert read_curves(tmp_path)["train/loss"].tolist() == [0.5, 0.25]


def test_what_a_checkpoint_is_beyond_is_on_the_disk(tmp_path: Path) -> None:
    """The step of the checkpoint, too, whose metrics come right behind it; new columns replace the file."""
    logger = MetricsFile(tmp_path)
    for step in range(3):
        logger.log_metrics({"train/loss": step / 4}, step)
    assert not (tmp_path / "metrics.csv").exists()
    logger.after_save_checkpoint(None)
    assert read_curves(tmp_path)["step"].tolist() == [0, 1, 2]
    logger.log_metrics({"train/loss": 0.75}, 3)
    assert read_curves(tmp_path)["step"].tolist() == [0, 1, 2, 3]
    logger.log_metrics({"val/loss": 9.0}, 3)
    logger.finalize("success")
    curves = read_curves(tmp_path)
    assert curves["val/loss"].dropna().tolist() == [9.0] and curves["train/loss"].dropna().tolist() == [
        0,
        0.25,
        0.5,
        0.75,
    ]


def test_metrics_that_could_not_be_written_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a new column, and at the end of the file, of which a half is no line."""
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    logger.log_metrics({"b": 2.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            logger.save()
    logger.save()
    logger.log_metrics({"a": 3.0}, 2)
    before = (tmp_path / "metrics.csv").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 2, limit[1]))
        with pytest.raises(OSError, match="too large"):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    logger.finalize("failed")
    curves = read_curves(tmp_path)
    assert curves["step"].tolist() == [0, 1, 2]
    assert curves["a"].dropna().tolist() == [1, 3] and curves["b"].dropna().tolist() == [2]


def test_the_parts_of_a_run_are_joined_at_the_step_from_which_it_went_on(tmp_path: Path) -> None:
    for name, steps in {"metrics-part2": (2, 3), "metrics-part1": (0, 1, 2, 3, 4), "metrics": (3, 4, 5)}.items():
        pd.DataFrame({"step": steps, "train/loss": [float(f"{name.count('part')}.{s}") for s in steps]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    curves = read_curves(tmp_path)
    assert curves["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert curves["train/loss"].tolist() == [1.0, 1.1, 1.2, 0.3, 0.4, 0.5]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none has logged nothing yet"):
        read_curves(tmp_path / "none")


def test_a_validation_behind_the_last_step_is_no_step(tmp_path: Path) -> None:
    path = run_of(tmp_path / "resumed") / "metrics.csv"
    metrics = pd.read_csv(path)
    pd.concat([metrics, metrics.tail(1).assign(step=6)]).to_csv(path, index=False)
    assert compare([tmp_path / "resumed"], tmp_path / "out")["steps"].item() == 6


def test_runs_of_the_same_name_are_called_by_their_paths(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / place / "run") for place in ("a", "b")]
    assert compare(runs, tmp_path / "out")["run"].tolist() == [str(run) for run in runs]


def test_differences_come_by_importance() -> None:
    one = {"trainer.max_steps": 1, "data.seed": 1, "model": "A", "model.width": 1, "seed_everything": 0}
    two = {"trainer.max_steps": 2, "data.seed": 1, "model": "B", "model.layers": 1, "seed_everything": 1}
    assert differences([one, two]) == ["model.width", "model.layers", "trainer.max_steps", "seed_everything"]


@pytest.mark.usefixtures("own_cache")
def test_real_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gru, smoke = ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml", ROOT / "configs/overlays/smoke.yaml"
    data = "--data.init_args.synthetic={videos: 4, users: 4, seconds: 30}"
    for width in (16, 32):
        own = ["--model.init_args.width", str(width), "--run_dir", str(tmp_path / f"width-{width}")]
        main(["fit", "--config", str(gru), "--config", str(smoke), data, *own, "--quiet"])
    capsys.readouterr()
    table = compare(sorted(tmp_path.iterdir()), tmp_path / "out").set_index("run")
    assert table["model.width"].tolist() == [16, 32] and table.columns[-1] == "model.width"
    assert table["finished"].all() and (table["steps"] == 2).all() and (table["train_s"] > 0).all()
    assert (table["trainable_share"] == 1).all() and np.isfinite(table["best"]).all()
    summary = pd.read_csv(tmp_path / "width-16" / "summary.csv").query("metric == 'mae_deg'")
    assert table.loc["width-16", "test/mae_deg"] == summary["mean"].iloc[-1]
