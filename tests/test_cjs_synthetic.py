"""Generated workloads: their statistics against those of the TPC-H profiles, and their seeds."""

from typing import Any

import numpy as np
import pytest

from netllm_pl.errors import UserError
from tasks.job_scheduling.profiles import Profiles
from tasks.job_scheduling.profiles_parquet import read_parquet, write_parquet
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate, generate_profiles
from tasks.job_scheduling.workloads import LEVELS, Workload, prepare, read_workload

# Statistics of the TPC-H profiles of decima-sim (154 jobs), with the tolerance of a generated workload of 154 jobs.
TPCH: dict[str, tuple[float, float]] = {
    "stages, median": (8, 2.5),
    "stages, mean": (9.18, 0.8),
    "stages, most": (18, 2),
    "depth, median": (6, 1.5),
    "edges a stage": (0.926, 0.04),
    "share of sources": (0.386, 0.03),
    "share of joins": (0.297, 0.03),
    "share of sinks": (0.109, 0.01),
    "share of empty fresh lists": (0.715, 0.05),
    "share of empty rest lists": (0.370, 0.06),
    "inflation of work, level 50 to 5": (1.83, 0.4),
    "inflation of work, level 100 to 5": (2.88, 0.7),
    "inflation of later tasks, level 100 to 5": (2.96, 0.6),
    "first to later tasks": (2.96, 0.9),
    "fresh to first tasks": (1.67, 0.25),
    "share of the top tenth in work": (0.364, 0.09),
    "log-deviation of work": (0.959, 0.25),
}
RATIOS: dict[str, tuple[float, float]] = {  # these within a factor
    "tasks, median": (1018, 1.25),
    "tasks, tenth percentile": (429, 1.8),
    "tasks, most": (3717, 1.6),
    "work, s, median": (535, 1.4),
    "work, s, mean": (926, 1.3),
    "work, s, least": (45, 2.5),
    "work, s, most": (7323, 2.4),
    "work at 2g, s, median": (190, 1.6),
    "work at 100g, s, median": (1996, 1.4),
    "later tasks, ms, median": (96, 1.7),
    "first tasks, ms, median": (402, 1.7),
}


def work(profiles: Profiles, workload: Workload, level: int) -> Any:
    """(T,) executor-seconds of jobs at a level, or their largest one: all first and later tasks."""
    ends = np.concatenate([[0.0], np.cumsum(profiles.durations)])
    lists = ends[profiles.list_start + profiles.list_size] - ends[profiles.list_start]
    stage = np.repeat(np.arange(profiles.stages), np.diff(profiles.level_start))
    used = profiles.levels == workload.level_key[stage, LEVELS.index(level)]
    return np.bincount(stage[used], lists[used, 1:].sum(1)).cumsum()[profiles.stage_start[1:] - 1]


def statistics(profiles: Profiles) -> dict[str, float]:
    workload = prepare(profiles, "test")
    at = profiles.stage_start[:-1]
    stages, tasks = np.diff(profiles.stage_start), np.add.reduceat(workload.num_tasks, at)
    low, middle, high = (np.diff(work(profiles, workload, level), prepend=0.0) / 1e3 for level in (5, 50, 100))
    ends = np.concatenate([[0.0], np.cumsum(workload.durations)])
    with np.errstate(invalid="ignore"):
        sums = ends[workload.wave_start + workload.wave_size] - ends[workload.wave_start]
        means = sums / workload.wave_size
    fresh, first, rest = means[:, LEVELS.index(50)].T
    empty = (workload.wave_size == 0)[workload.level_present]
    parents, children = np.diff(workload.parent_start), np.diff(workload.child_start)
    return {
        "stages, median": float(np.median(stages)),
        "stages, mean": float(stages.mean()),
        "stages, most": float(stages.max()),
        "depth, median": float(np.median(np.maximum.reduceat(workload.height, at) + 1)),
        "edges a stage": len(workload.children) / len(children),
        "share of sources": float((parents == 0).mean()),
        "share of joins": float((parents > 1).mean()),
        "share of sinks": float((children == 0).mean()),
        "share of empty fresh lists": float(empty[:, 0].mean()),
        "share of empty rest lists": float(empty[:, 2].mean()),
        "inflation of work, level 50 to 5": float(np.median(middle / low)),
        "inflation of work, level 100 to 5": float(np.median(high / low)),
        "inflation of later tasks, level 100 to 5": float(np.nanmedian(means[:, -1, 2] / means[:, 0, 2])),
        "first to later tasks": float(np.nanmedian(first / rest)),
        "fresh to first tasks": float(np.nanmedian(fresh / first)),
        "share of the top tenth in work": float(np.sort(middle)[-len(middle) // 10 :].sum() / middle.sum()),
        "log-deviation of work": float(np.log(middle).std()),
        "tasks, median": float(np.median(tasks)),
        "tasks, tenth percentile": float(np.percentile(tasks, 10)),
        "tasks, most": float(tasks.max()),
        "work, s, median": float(np.median(middle)),
        "work, s, mean": float(middle.mean()),
        "work, s, least": float(middle.min()),
        "work, s, most": float(middle.max()),
        "work at 2g, s, median": float(np.median(middle[workload.sizes == "2g"])),
        "work at 100g, s, median": float(np.median(middle[workload.sizes == "100g"])),
        "later tasks, ms, median": float(np.nanmedian(rest)),
        "first tasks, ms, median": float(np.nanmedian(first)),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_statistics_are_near_those_of_the_tpch_profiles(seed: int) -> None:
    found = statistics(generate_profiles(SyntheticWorkload(seed=seed)))
    far = [f"{name}: {found[name]:.3g}, not {real} +- {by}" for name, (real, by) in TPCH.items()
           if not abs(found[name] - real) <= by]  # fmt: skip
    far += [f"{name}: {found[name]:.4g}, not {real} within a factor {by}" for name, (real, by) in RATIOS.items()
            if not real / by <= found[name] <= real * by]  # fmt: skip
    assert not far and len(found) == len(TPCH) + len(RATIOS)


def test_the_constants_are_those_of_the_profiles(data_dir: Any) -> None:
    found = statistics(read_parquet(data_dir / "cjs" / "tpch.parquet"))
    for name, (real, _) in (TPCH | RATIOS).items():
        assert found[name] == pytest.approx(real, rel=0.02), name


def test_every_seed_gives_jobs_that_can_be_run() -> None:
    """`prepare` refuses what cannot; shapes are within the published range, durations are whole milliseconds."""
    for seed in range(2, 12):
        workload = generate(SyntheticWorkload(seed=seed, queries=30, sizes=("2g", "100g")))
        stages = np.diff(workload.stage_start)
        assert stages.min() >= 2 and stages.max() <= 18
        depth = np.maximum.reduceat(workload.height, workload.stage_start[:-1]) + 1
        assert depth.min() >= 2 and depth.max() <= 9
        sinks = np.add.reduceat(np.diff(workload.child_start) == 0, workload.stage_start[:-1])
        assert (sinks == 1).all()
        assert (workload.durations == np.rint(workload.durations)).all() and workload.durations.min() >= 1


def test_as_many_executors_start_as_there_are() -> None:
    profiles = generate_profiles(SyntheticWorkload(seed=3))
    stage = np.repeat(np.arange(profiles.stages), np.diff(profiles.level_start))
    job = np.repeat(np.arange(len(profiles)), np.diff(profiles.stage_start))[stage]
    for level in LEVELS:
        rows = profiles.levels == level
        started = np.bincount(job[rows], profiles.list_size[rows, 0])
        tasks = np.bincount(job[rows], profiles.list_size[rows, 1:].sum(1))
        np.testing.assert_array_equal(started, np.minimum(tasks, level))


def test_equal_seeds_give_equal_workloads_and_others_share_no_job(tmp_path: Any) -> None:
    config = SyntheticWorkload(queries=4, sizes=("2g", "10g"), seed=5)
    one, again, other = (generate(SyntheticWorkload(4, ("2g", "10g"), seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.durations, again.durations)
    assert not set(one.rough_ms) & set(other.rough_ms)
    assert one.sizes.tolist() == ["2g"] * 4 + ["10g"] * 4 and one.queries.tolist() == [1, 2, 3, 4] * 2
    write_parquet(generate_profiles(config), tmp_path / "jobs.parquet")
    read = read_workload(tmp_path / "jobs.parquet")
    np.testing.assert_array_equal(read.medians, one.medians)
    np.testing.assert_array_equal(read.num_tasks, one.num_tasks)


def test_scale_and_spread_change_durations_only() -> None:
    settings = ((1, 1), (2, 1), (1, 0))
    plain, scaled, alike = (generate(SyntheticWorkload(6, scale=scale, spread=spread)) for scale, spread in settings)
    for other in (scaled, alike):
        np.testing.assert_array_equal(other.num_tasks, plain.num_tasks)
        np.testing.assert_array_equal(other.children, plain.children)
    np.testing.assert_allclose(scaled.rough_ms, 2 * plain.rough_ms, rtol=0.05)
    shuffles = plain.num_tasks == 200
    assert np.log(alike.rough_ms[shuffles]).std() < 0.8 * np.log(plain.rough_ms[shuffles]).std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 0}, "synthetic.queries: 0; expected 1 to"),
        ({"seed": -1}, "synthetic.seed: -1"),
        ({"scale": float("nan")}, "synthetic.scale: nan"),
        ({"spread": 3.0}, "synthetic.spread: 3.0"),
        ({"sizes": ()}, "synthetic.sizes: none"),
        ({"sizes": ("2g", "2g")}, "expected different sizes"),
        ({"sizes": ("large",)}, "'large' is no size up to 1000 GB; write 10g for 10 GB"),
        ({"sizes": ("0g",)}, "'0g' is no size"),
        ({"sizes": ("2000g",)}, "'2000g' is no size"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticWorkload(**changes)
