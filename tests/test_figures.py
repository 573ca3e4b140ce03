"""What the figures of the three tasks show agrees with what their simulators and metrics say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from netllm_pl.drawing import blank, distribution, pixels
from tasks.adaptive_bitrate import AdaptiveBitrateData
from tasks.adaptive_bitrate.figures import bandwidth, downloads, draw_session
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.job_scheduling import JobSchedulingData
from tasks.job_scheduling.figures import bars, draw_gantt, in_system
from tasks.job_scheduling.simulator import Rules as ClusterRules
from tasks.job_scheduling.synthetic import SyntheticWorkload
from tasks.viewport_prediction import ViewportPredictionData
from tasks.viewport_prediction.figures import SHOWN
from tasks.viewport_prediction.synthetic import Synthetic

ROOT = Path(__file__).parent.parent
Watched = dict[str, dict[str, Any]]


def watch(data: Any, *names: str) -> Watched:
    """Policies under a model's name and their own."""
    return {"model" if k == 0 else name: data.watch(data.policy(name, "valid")) for k, name in enumerate(names)}


def lines(axes: Any) -> dict[str, Any]:
    """Lines by the first word of their label."""
    return {str(line.get_label()).split(" ")[0]: line for line in axes.lines}


# Drawing --------------------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_figure() -> None:
    figure, axes = blank(2, size=(3.0, 2.0))
    assert len(axes) == 2
    figure.set_facecolor((1.0, 0.0, 0.0))
    image = pixels(figure)
    assert image.shape == (200, 300, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [255, 0, 0]


def test_a_distribution_is_the_share_up_to_each_value() -> None:
    _, (axes,) = blank()
    distribution(axes, {"a": np.array([3.0, 1.0, 2.0, 2.0])}, "s")
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.25], [2, 0.5], [2, 0.75], [3, 1]]
    assert axes.lines[0].get_label() == "a (mean 2)"


# Viewport prediction --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def viewport() -> ViewportPredictionData:
    return ViewportPredictionData(synthetic=Synthetic(videos=6, users=6, seconds=30))


def test_the_error_over_the_horizon_is_that_of_the_metric(viewport: ViewportPredictionData) -> None:
    watched = watch(viewport, "ridge", "static")
    drawn = lines(viewport.figures(watched)["error_over_horizon"].axes[0])
    for name, tables in watched.items():
        seconds, errors = drawn[name].get_data()
        np.testing.assert_allclose(seconds, 0.2 * np.arange(1, 21))
        np.testing.assert_allclose(errors.mean(), tables["episodes"]["mae_deg"].mean())
    # few windows: all of them are shown, so the numbers are those of the evaluation
    everything = viewport.episodes(viewport.policy("static"), "valid")
    assert len(everything) <= 64
    np.testing.assert_allclose(watched["static"]["episodes"]["mae_deg"], everything["mae_deg"])


def test_paths_start_where_the_viewer_looked_and_cross_the_seam(viewport: ViewportPredictionData) -> None:
    watched = watch(viewport, "static", "ridge")
    figure = viewport.figures(watched)["paths"]
    assert len(figure.axes) == len(SHOWN)
    table = watched["model"]["samples"]
    angles = table[["yaw", "pitch"]].to_numpy().reshape(-1, 30, 2)
    reach = []
    for axes in figure.axes:
        drawn = lines(axes)
        true = drawn["true"].get_xydata()
        assert true.shape == (21, 2) and (true[0] == 0).all()
        assert np.abs(np.diff(true, axis=0)).max() < 180, "no jump at the seam"
        np.testing.assert_allclose(drawn["model"].get_xydata(), 0.0, atol=1e-9)  # static stays
        assert np.abs(drawn["ridge"].get_xydata()).max() > 0
        ends = (angles[:, -1] - angles[:, 9] - true[-1] + 180) % 360 - 180
        assert np.isclose(ends, 0, atol=1e-3).all(1).any(), "the path of one of the windows"
        reach.append(np.abs(np.concatenate([true, drawn["seen"].get_xydata()])).max())
    assert reach[-1] == max(reach)


# Adaptive bitrate -----------------------------------------------------------------------------------------------------


def streaming(**arguments: Any) -> AdaptiveBitrateData:
    small: dict[str, Any] = {
        "synthetic": SyntheticTraces(traces=6, duration_s=60),
        # short buffer: clients wait, over several intervals of the trace; sessions are longer than traces
        "rules": Rules(chunks=30, buffer_limit_s=9.0),
        "valid_starts": 3,
    }
    return AdaptiveBitrateData(**small | arguments)


def test_each_download_takes_the_bandwidth_that_is_drawn() -> None:
    data = streaming()
    env = data.simulator("valid")
    steps = data.watch(data.policy("bba", "valid"))["steps"]
    waited = again = 0.0
    for session in range(len(env.traces)):
        table = steps.iloc[session * env.chunks : (session + 1) * env.chunks]
        starts, ends, waits = downloads(table, env)
        edges, mbps = bandwidth(env.traces, session, ends[-1])
        carried = np.append(0.0, np.cumsum(np.diff(edges) * mbps))  # Mbit up to each edge
        through = np.interp(ends, edges, carried) - np.interp(starts, edges, carried)
        np.testing.assert_allclose(through * env.rules.payload * 1e6 / 8, table["chunk_bytes"], rtol=1e-6)
        waited, again = waited + waits.sum(), max(again, ends[-1])
    assert waited > 10 and again > 60, "the test needs clients that wait, and traces that begin again"


def test_one_session_shows_bitrates_buffers_and_stalls_of_all_policies() -> None:
    data = streaming(rules=Rules(chunks=12))
    watched = watch(data, "constant", "bba", "robust_mpc")
    steps = {name: tables["steps"] for name, tables in watched.items()}
    env = data.simulator("valid")
    rates, buffers, stalls = draw_session(steps, env).axes
    shown = int(rates.get_title().split()[2])
    stalled = sum(steps[name]["rebuffer_s"].to_numpy().reshape(-1, 12).sum(1) for name in ("bba", "robust_mpc"))
    assert shown == stalled.argmax()
    rows = slice(shown * 12, shown * 12 + 12)
    for k, (name, table) in enumerate(steps.items()):
        own = table.iloc[rows]
        np.testing.assert_allclose(lines(rates)[name].get_ydata(), env.ladder[own["bitrate"]] / 1000)
        np.testing.assert_allclose(buffers.lines[k].get_ydata(), own["buffer_s"])
        widths = [np.ptp(path.vertices[:, 0]) for path in stalls.collections[k].get_paths()]
        np.testing.assert_allclose(sum(widths), own["rebuffer_s"].sum())
    assert "bandwidth" in [patch.get_label() for patch in rates.patches]


def test_in_random_mode_the_measured_throughput_is_drawn() -> None:
    data = streaming(mode="random")
    table = data.watch(data.policy("bba", "valid"))["steps"]
    rates = draw_session({"model": table}, data.simulator("valid")).axes[0]
    (drawn,) = [patch for patch in rates.patches if patch.get_label() == "bandwidth"]
    own = table.iloc[int(rates.get_title().split()[2]) * 30 :][:30]
    np.testing.assert_allclose(drawn.get_data().values, own["chunk_bytes"] * 0.008 / own["delay_ms"])


# Job scheduling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> JobSchedulingData:
    return JobSchedulingData(
        synthetic=SyntheticWorkload(queries=4, sizes=("2g", "5g")),
        rules=ClusterRules(jobs=6, executors=8, arrival_rate=2e-4),
        valid_seeds=[11, 12],
    )


def test_bars_of_the_schedule_agree_with_the_simulator(cluster: JobSchedulingData) -> None:
    watched = watch(cluster, "srpt_fair", "fair", "fifo")
    tasks = watched["model"]["tasks"]
    assert set(tasks["episode"]) == {11}
    drawn = bars(tasks)
    assert len(drawn) < len(tasks), "tasks that follow each other are joined"
    busy = (drawn["end_ms"] - drawn["start_ms"]).groupby([drawn["executor_id"], drawn["job_id"]]).sum()
    taped = tasks["duration_ms"].groupby([tasks["executor_id"], tasks["job_id"]]).sum()
    np.testing.assert_allclose(busy, taped)
    assert busy.index.equals(taped.index)
    for _, own in drawn.groupby("executor_id"):
        assert (own["start_ms"].to_numpy()[1:] >= own["end_ms"].to_numpy()[:-1]).all(), "one job at a time"
    # a job is complete when its last bar ends
    jobs = watched["model"]["jobs"]
    jobs = jobs[jobs["episode"] == 11].set_index("job_id")
    np.testing.assert_allclose(drawn.groupby("job_id")["end_ms"].max(), jobs["t_completed_ms"])
    # and those are the rectangles of the picture, beside the last baseline's
    figure = draw_gantt({name: tables["tasks"] for name, tables in watched.items()})
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["model", "fifo"]
    (rectangles,) = figure.axes[0].collections
    assert isinstance(rectangles, PolyCollection)
    corners = np.array([path.vertices[:4] for path in rectangles.get_paths()])
    np.testing.assert_allclose(corners[:, 0, 0], drawn["start_ms"] / 1000)
    np.testing.assert_allclose(corners[:, 2, 0], drawn["end_ms"] / 1000)
    np.testing.assert_allclose(corners[:, :, 1].mean(1), drawn["executor_id"])
    colours = rectangles.get_facecolors()  # type: ignore[attr-defined]
    assert len({tuple(colour) for colour in colours}) == drawn["job_id"].nunique()


def test_jobs_in_the_system_add_up_to_completion_times(cluster: JobSchedulingData) -> None:
    jobs = cluster.watch(cluster.policy("fair", "valid"))["jobs"]
    times, counts, jct_s = in_system(jobs)
    own = jobs[jobs["episode"] == 11]
    total = (own["t_completed_ms"] - own["t_arrival_ms"]).sum() / 1000
    np.testing.assert_allclose((np.diff(times) * counts[:-1]).sum(), total)
    assert counts[-1] == 0 and counts.min() == 0
    assert jct_s == pytest.approx(total / len(own))


# All ------------------------------------------------------------------------------------------------------------------


def test_watched_episodes_are_those_that_are_evaluated(cluster: JobSchedulingData) -> None:
    for data, name in ((streaming(), "robust_mpc"), (cluster, "srpt_fair")):
        plain = data.episodes(data.policy(name, "valid"), "valid")
        assert data.watch(data.policy(name, "valid"))["episodes"].equals(plain)


def test_only_a_simulator_with_a_tape_tells_of_tasks(cluster: JobSchedulingData) -> None:
    assert "tasks" not in cluster.tables(cluster.policy("fair"), steps=True)


def test_a_model_alone_is_drawn(viewport: ViewportPredictionData, cluster: JobSchedulingData) -> None:
    names = {}
    for data, name in ((viewport, "static"), (streaming(), "bba"), (cluster, "fair")):
        figures = data.figures(watch(data, name))
        names[type(data).__name__] = list(figures)
        for figure in figures.values():
            height, width, _ = pixels(figure).shape
            assert 300 <= height <= 1000 and 300 <= width <= 1000
    assert names == {
        "ViewportPredictionData": ["paths", "error_over_horizon"],
        "AdaptiveBitrateData": ["session", "qoe"],
        "JobSchedulingData": ["schedule", "jobs_in_system", "completion"],
    }


def test_drawing_leaves_pyplot_alone() -> None:
    code = "import netllm_pl.drawing as d, sys; d.pixels(d.blank()[0]); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
