"""Every shipped config trains and is tested through the command line, and the commands agree with each other."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from netllm_pl.checkpoint import build
from netllm_pl.cli import main
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "baselines").glob("*.yaml")])
CONFIGS.remove(ROOT / "configs" / "multi_task.yaml")  # several tasks leave other files: tests/test_multi_task.py
OVERLAYS = sorted((ROOT / "configs" / "overlays").rglob("*.yaml"))
SMALL = {  # arguments that make the built-in data of a task small
    "ViewportPredictionData": ["--data.init_args.synthetic={videos: 6, users: 6, seconds: 30}"],
    "AdaptiveBitrateData": [
        "--data.init_args.synthetic={traces: 6, duration_s: 60}",
        "--data.init_args.rules={chunks: 10}",
    ],
    "JobSchedulingData": [
        "--data.init_args.synthetic={queries: 3, sizes: [2g]}",
        "--data.init_args.rules={jobs: 3, executors: 5}",
        "--data.init_args.test_seeds=[1, 2]",
    ],
    "MultiTaskData": [
        "--data.init_args.changes={viewport_prediction: {synthetic: {videos: 6, users: 6, seconds: 30}},"
        " adaptive_bitrate: {synthetic: {traces: 6, duration_s: 60}, rules: {chunks: 10},"
        " experience: {policies: bba, episodes: 4, eval_episodes: 2}},"
        " job_scheduling: {synthetic: {queries: 3, sizes: [2g]}, rules: {jobs: 3, executors: 5},"
        " experience: {policies: fair, episodes: 2, eval_episodes: 1}}}"
    ],
}
EPISODES = ["--data.init_args.experience.episodes=8", "--data.init_args.experience.eval_episodes=4"]
VIEWPORT = ROOT / "configs" / "viewport_prediction.yaml"
GRU = ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml"
TINY = ROOT / "configs" / "llm" / "tiny_random.yaml"


def words(config: Path) -> list[str]:
    """A config, two small batches of small data, and a tiny language model where there is one."""
    tree = yaml.safe_load(config.read_text())
    small = [
        *SMALL.get(tree["data"]["class_path"], []),
        *(EPISODES if tree["data"]["init_args"].get("experience") else []),
    ]
    tiny = ["--model.init_args.backbone", str(TINY)] if "backbone" in tree["model"]["init_args"] else []
    return ["--config", str(config), "--config", str(ROOT / "configs" / "overlays" / "smoke.yaml"), *small, *tiny]


def printed(text: str, name: str) -> float:
    """A metric in the table that Lightning prints."""
    found = re.search(rf"{name}\W+(-?\d+\.\d+(?:e[+-]?\d+)?)", text)
    assert found, f"{name} is not in {text}"
    return float(found[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a short training of the main config."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        main(["fit", *words(VIEWPORT), "--run_dir", str(folder / "run")])
    return folder / "run"


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_trains_and_is_tested(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["fit", *words(config), "--run_dir", str(tmp_path / "run")])
    table = capsys.readouterr().out
    assert "best.ckpt" in table and "95 % interval" in table
    assert not [str(warning.message) for warning in caught if "serialize" in str(warning.message)]
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "summary.csv"} <= written
    main(["test", *words(config), "--run_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "run" / "best.ckpt")])
    assert np.isfinite(printed(capsys.readouterr().out, "test/loss"))
    main(["predict", *words(config), "--run_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "run" / "best.ckpt")])
    predicted = pd.read_parquet(tmp_path / "predictions.parquet")
    known = {"window", "video", "user", "t"}, {"episode", "policy", "step"}, {"session"}, {"sample"}
    assert any(names < set(predicted.columns) for names in known)
    assert len(predicted) > 0 and not predicted.isna().any(axis=None)


@pytest.mark.usefixtures("own_cache")
def test_validate_and_test_give_the_metrics_of_fit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--ckpt_path", str(trained / "best.ckpt"), "--run_dir", str(trained.parent / "again")]
    main(["test", *words(VIEWPORT), *checkpoint])
    summary = pd.read_csv(trained / "summary.csv").set_index(["policy", "metric"])["mean"]
    measured = printed(capsys.readouterr().out, "test/mae_deg")
    assert measured == pytest.approx(summary[str(trained / "best.ckpt"), "mae_deg"], rel=1e-4)
    main(["validate", *words(VIEWPORT), *checkpoint])
    logged = pd.read_csv(trained / "metrics.csv")["val/mae_deg"].dropna().min()
    assert printed(capsys.readouterr().out, "val/mae_deg") == pytest.approx(logged, rel=1e-4)


@pytest.mark.usefixtures("own_cache")
def test_predict_writes_the_predictions_of_the_test_split(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", *words(VIEWPORT), "--ckpt_path", str(trained / "best.ckpt"), "--run_dir", str(tmp_path)])
    path = tmp_path / "predictions.parquet"
    assert f"wrote {path}" in capsys.readouterr().out
    found, _best = pd.read_parquet(path), str(trained / "best.ckpt")
    assert list(found.columns) == ["window", "video", "user", "t", "roll", "pitch", "yaw"]
    measured = pd.read_parquet(trained / "episodes.parquet").query("policy == @_best").reset_index(drop=True)
    same = ["window", "video", "user", "t"]
    pd.testing.assert_frame_equal(found[same], measured[same], check_dtype=False)
    roll, truth = np.stack(list(found["roll"])), np.stack([_truth(trained, int(row)) for row in found["window"]])
    error = np.abs((roll - truth + 180) % 360 - 180).mean(1)
    np.testing.assert_allclose(error, measured["mae_roll_deg"], rtol=1e-4)


def _truth(run: Path, window: int) -> np.ndarray:
    """What the roll of a test window really was."""
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    data = build(NetDataModule, data["class_path"].rpartition(".")[2], data["init_args"], "data module")
    return data.dataset("test")[[window]]["future"][0, :, 0].numpy()


@pytest.mark.usefixtures("own_cache")
def test_what_a_checkpoint_holds_does_not_win(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ["--ckpt_path", str(trained / "best.ckpt"), "--run_dir", str(tmp_path)]
    main(["test", *words(VIEWPORT), *checkpoint])
    as_trained = printed(capsys.readouterr().out, "test/loss")
    main(["test", *words(VIEWPORT), *checkpoint, "--model.init_args.objective", "mse"])
    assert printed(capsys.readouterr().out, "test/loss") > 1.5 * as_trained


# Other commands -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_evaluate_takes_the_config_of_a_run_and_writes_its_tables(trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "best.ckpt")
    policies = ["static", "velocity", checkpoint]
    config = str(trained / "config.yaml")
    main(["evaluate", "--config", config, "--policies", ",".join(policies), "--out", str(tmp_path)])
    summary = pd.read_csv(tmp_path / "summary.csv")
    expected = ["policy", "metric", "mean", "low", "high", "paired_mean", "paired_low", "paired_high", "n"]
    assert list(summary.columns) == expected
    assert list(summary["policy"].unique()) == policies
    episodes = pd.read_parquet(tmp_path / "episodes.parquet")
    assert {"policy", "window", "video", "user", "t", "cluster", "mae_deg", "mse_deg2"} <= set(episodes.columns)
    assert (episodes.groupby("policy").size() == summary["n"].iloc[0]).all()
    fitted = pd.read_csv(trained / "summary.csv")
    mean = summary.query("policy == @checkpoint and metric == 'mae_deg'")["mean"].item()
    assert mean == pytest.approx(fitted.query("policy == @checkpoint and metric == 'mae_deg'")["mean"].item(), rel=1e-6)


@pytest.mark.usefixtures("own_cache")
def test_an_exported_folder_predicts_like_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    checkpoint, folder = str(trained / "best.ckpt"), str(tmp_path / "exported")
    main(["export", checkpoint, "--out", folder])
    config = str(trained / "config.yaml")
    main(["evaluate", "--config", config, "--policies", f"{checkpoint},{folder}", "--out", str(tmp_path / "table")])
    episodes = pd.read_parquet(tmp_path / "table" / "episodes.parquet")
    columns = ["window", "mae_deg", "mae_roll_deg", "mae_pitch_deg", "mae_yaw_deg", "mse_deg2"]
    first, second = (episodes[episodes["policy"] == policy][columns] for policy in (checkpoint, folder))
    assert len(first) > 0
    np.testing.assert_array_equal(first.to_numpy(), second.to_numpy())


# What wins ------------------------------------------------------------------------------------------------------------


def test_an_option_before_the_config_wins_over_it(tmp_path: Path) -> None:
    option = ["--data.init_args.batch_size", "17"]
    config = ["--config", str(GRU)]
    saved = []
    for order in ([*option, *config], [*config, *option]):
        folder = tmp_path / str(len(saved))
        quick = ["--trainer.max_steps", "0", "--trainer.accelerator", "cpu", *SMALL["ViewportPredictionData"]]
        main(["fit", *order, *quick, "--trainer.limit_val_batches", "0", "--run_dir", str(folder)])
        saved.append(yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["batch_size"])
    assert saved == [17, 17]


def test_a_file_can_name_the_file_of_its_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llm.yaml").write_text(TINY.read_text())
    (tmp_path / "overlay.yaml").write_text("model:\n  init_args:\n    backbone: llm.yaml\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(VIEWPORT), "--config", str(tmp_path / "overlay.yaml"), "--print_config"])
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert (backbone["name"], backbone["layers"], backbone["config"]["hidden_size"]) == ("llama", None, 32)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_changes_arguments_but_names_no_class(overlay: Path) -> None:
    assert "class_path" not in overlay.read_text()


# The front door -------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from netllm_pl.cli import main; main(['--help']);"
        "print('heavy:', [name for name in ('torch', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m netllm_pl COMMAND")
    assert done.stdout.endswith("heavy: []\n")


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evalute"])
    text = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Did you mean 'evaluate'?" in text
    for command in ("fit", "validate", "test", "predict", "evaluate", "export", "fetch"):
        assert command in text


def test_the_configuration_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--data.init_args.batch_size=17", "--config", str(GRU), "--print_config"])
    assert caught.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["batch_size"] == 17


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        main(["fit", "--config", "nowhere.yaml", "--debug"])


def test_a_mistake_prints_its_message_and_nothing_else(tmp_path: Path) -> None:
    """A process of its own: pytest takes over warnings and logs."""
    run = [sys.executable, "-m", "netllm_pl", "fit", "--config", str(GRU), "--data.init_args.history", "0"]
    done = subprocess.run([*run, "--run_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: data.history is 0; it must be at least 1\n"


@pytest.mark.parametrize("option", ["backbone.lora", "vision", "optimizer", "backbone.layers"])
@pytest.mark.parametrize("form", ["--model.init_args.{} null", "--model.{}=null"])
def test_null_on_the_command_line_is_null(option: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "viewport_prediction.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, *form.format(option).split(), "--print_config"])
    assert stop.value.code in (0, None)
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    *above, last = option.split(".")
    for key in above:
        settings = settings[key]
    assert settings[last] is None
    assert option != "backbone.lora" or settings["layers"] == 2, "what the file says of the backbone is kept"


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "llm").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_backbone_file_is_a_backbone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "viewport_prediction.yaml")
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--model.init_args.backbone", str(file), "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert settings.items() >= {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "lora"}.items()
