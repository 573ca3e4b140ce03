"""What runs from the command line leave in TensorBoard, by default and as they are told to."""

from pathlib import Path

import pandas as pd
import pytest
from tensorboard.plugins.hparams import metadata
from test_tensorboard import SCALE, events, scalars

from netllm_pl.cli import main

ROOT = Path(__file__).parent.parent
GRU = ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml"
HINDSIGHT = ROOT / "configs" / "baselines" / "adaptive_bitrate_hindsight.yaml"
SMOKE = ["--config", str(ROOT / "configs" / "overlays" / "smoke.yaml"), "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs through the command line: as by default, and with all switched off."""
    folder = tmp_path_factory.mktemp("runs")
    viewport = ["--config", str(GRU), *SMOKE, "--data.init_args.synthetic={videos: 6, users: 6, seconds: 30}"]
    off = ["--figures=false", "--costs=false"]
    own = ["--trainer.callbacks+=Figures", "--trainer.callbacks.share=1.0", "--trainer.callbacks.baselines=[linear]"]
    streaming = [
        "--config", str(HINDSIGHT), *SMOKE, "--data.init_args.synthetic={traces: 6, duration_s: 60}",
        "--data.init_args.rules={chunks: 10}", "--data.init_args.experience={episodes: 8, eval_episodes: 4}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        todo = {"viewport": viewport, "off": [*viewport, *off], "own": [*viewport, *own], "streaming": streaming}
        for name, words in todo.items():
            main(["fit", *words, "--run_dir", str(folder / name)])
    return folder


def test_fit_shows_all_of_it_by_default(runs: Path) -> None:
    for name, images in (("viewport", ["paths", "error_over_horizon"]), ("streaming", ["session", "qoe"])):
        found = events(runs / name)
        tags = found.Tags()
        assert tags["images"] == [f"figures/{image}" for image in images]
        assert {"train/loss", "val/loss", "epoch", *SCALE} <= set(tags["scalars"])
        assert "config/text_summary" in tags["tensors"]
        summary = pd.read_csv(runs / name / "summary.csv")
        best = summary[summary["policy"].str.endswith("best.ckpt")].set_index("metric")["mean"]
        assert {tag for tag in tags["scalars"] if tag.startswith("test/")} == {
            f"test/{metric}" for metric in best.index
        }
        for metric, mean in best.items():
            assert found.Scalars(f"test/{metric}")[-1].value == pytest.approx(mean, rel=1e-5)
        contents = found.PluginTagToContent("hparams")
        start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG]).hparams
        assert start["data.batch_size"].number_value == 4 and start["trainer.max_steps"].number_value == 2
    assert "val/qoe" in events(runs / "streaming").Tags()["scalars"]


def test_it_can_be_switched_off_and_changes_no_result(runs: Path) -> None:
    tags = events(runs / "off").Tags()
    assert tags["images"] == [] and not [tag for tag in tags["scalars"] if tag.startswith("cost/")]
    assert {"train/loss", "val/loss"} <= set(tags["scalars"])
    for tag in ("train/loss", "val/loss", "test/mae_deg"):
        assert scalars(runs / "off", tag) == scalars(runs / "viewport", tag)


def test_a_callback_of_the_config_replaces_the_default_one(runs: Path) -> None:
    (drawn,), (default,) = (events(runs / name).Images("figures/error_over_horizon") for name in ("own", "viewport"))
    assert drawn.step == default.step == 1
    assert drawn.encoded_image_string != default.encoded_image_string, "another baseline"


def test_a_runs_config_serves_other_commands(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(runs / "off" / "config.yaml")
    assert "figures: false" in Path(config).read_text()
    main(["evaluate", "--config", config, "--policies", "static", "--out", str(tmp_path)])
    assert "static" in capsys.readouterr().out
