"""TensorBoard's own pages, in headless Chromium, on the events of short runs: scalars, images, HParams, text."""

import json
import logging
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard import program

from netllm_pl.cli import main

ROOT = Path(__file__).parent.parent
GRU = ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml"
FLAGS = (  # the second line: a page on this machine needs no other
    "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
RATES = (0.001, 0.002)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for rate in RATES:
        main(
            [
                "fit", "--config", str(GRU), "--config", str(ROOT / "configs" / "overlays" / "smoke.yaml"),
                "--data.init_args.synthetic={videos: 6, users: 6, seconds: 30}",
                f"--model.init_args.optimizer.lr={rate}", "--trainer.enable_progress_bar=false",
                "--run_dir", str(folder / f"rate-{rate}"),
            ]
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> str:
    """A TensorBoard on this machine; its thread ends with the tests."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    board = program.TensorBoard()
    board.configure(
        ("tensorboard", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false")
    )
    return str(board.launch())


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """A tab of a real browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium; install Debian's package `chromium`")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=list(FLAGS))
        tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
        tab.set_default_timeout(60_000)
        yield tab
        chromium.close()


def open_tab(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}#{name}")
    page.reload()


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_server_knows_scalars_images_and_hyperparameters(address: str) -> None:
    scalars, images = (ask(address, f"data/plugin/{plugin}/tags") for plugin in ("scalars", "images"))
    for rate in RATES:
        tags = set(scalars[f"rate-{rate}"])
        assert {"train/loss", "val/mae_deg", "test/mae_deg", "cost/samples_per_s", "cost/decision_ms"} <= tags
        assert set(images[f"rate-{rate}"]) == {"figures/paths", "figures/error_over_horizon"}
    experiment = ask(address, "data/plugin/hparams/experiment", {"experimentName": ""})
    infos = {info["name"]: info for info in experiment["hparamInfos"]}
    assert infos["model.optimizer.lr"]["differs"] and infos["model"]["domainDiscrete"] == ["ViewportGRU"]
    assert [name for name, info in infos.items() if info["differs"]] == ["model.optimizer.lr"]
    asked = {
        "experimentName": "", "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": {"group": "", "tag": tag}} for tag in ("val/mae_deg", "test/mae_deg")],
    }  # fmt: skip
    groups = ask(address, "data/plugin/hparams/session_groups", asked)["sessionGroups"]
    assert sorted(group["hparams"]["model.optimizer.lr"] for group in groups) == list(RATES)
    for group in groups:
        values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        assert values["val/mae_deg"] > 0 and values["test/mae_deg"] > 0


def test_curves_are_on_the_page(page: Any, address: str) -> None:
    open_tab(page, address, "timeseries")
    for card in ("samples_per_s", "decision_ms", "peak_memory_gb", "trainable_fraction"):
        page.get_by_text(card, exact=False).first.wait_for()
    for group in ("cost", "train", "val", "test"):
        page.get_by_text(group, exact=True).first.wait_for()
    assert page.locator("line-chart").count() >= 4


def test_figures_are_on_the_page(page: Any, address: str) -> None:
    open_tab(page, address, "images")
    for tag in ("figures/paths", "figures/error_over_horizon"):
        page.get_by_text(tag).first.wait_for()
    shown = page.locator("tf-image-loader img")
    shown.first.wait_for()
    assert shown.count() == 4  # two figures of two runs
    for k in range(4):
        page.wait_for_function(
            "image => image.complete && image.naturalWidth >= 700", arg=shown.nth(k).element_handle()
        )


def test_runs_can_be_compared_by_hyperparameters(page: Any, address: str) -> None:
    open_tab(page, address, "hparams")
    for text in ("model.optimizer.lr", "test/mae_deg", "rate-0.001", "rate-0.002", "0.0010000", "0.0020000"):
        page.get_by_text(text).first.wait_for(state="attached")


def test_the_configuration_is_on_the_page(page: Any, address: str) -> None:
    open_tab(page, address, "text")
    for text in ("seed_everything: 0", "class_path: tasks.viewport_prediction.ViewportGRU"):
        page.get_by_text(text).first.wait_for()
