"""The cluster simulator: equal to the published program's logs, to Python's random streams, and to its own rules."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from netllm_pl.errors import UserError
from tasks.job_scheduling import streams
from tasks.job_scheduling.profiles import Profiles, starts
from tasks.job_scheduling.simulator import Observations, Rules, Simulator
from tasks.job_scheduling.workloads import Workload, prepare

LOGS = ("fair", "fifo", "sjf", "decima_argmax")
TOLD = (
    "wall_time_ms", "sel_job_id", "sel_stage_id", "num_exec_committed", "source_job_id", "num_committable",
    "n_active_jobs", "n_schedulable",
)  # fmt: skip
Stage = dict[str, Any]


# The published program's logs -----------------------------------------------------------------------------------------


def logged(cjs_logs: Path, log: str, kind: str) -> pd.DataFrame:
    return pd.read_parquet(cjs_logs / f"{log}_seed1_{kind}.parquet")


def summed(observations: Observations, n: int) -> np.ndarray:
    """Of one observation: nodes, edges, the sum of caps, and those of features."""
    counts = [len(observations["nodes"][n]), len(observations["edges"][n]), observations["caps"][n].sum()]
    return np.concatenate([counts, observations["nodes"][n].sum(0, dtype=np.float64)])


def assert_seen(observations: Observations, n: int, row: Any) -> None:
    """Compare with a full observation of the log."""
    x = np.array(row.x, np.float64).reshape(-1, 5)
    np.testing.assert_allclose(observations["nodes"][n], x, rtol=1e-6, atol=1e-6)
    edges = np.array(row.edges).reshape(-1, 2)
    assert {tuple(e) for e in observations["edges"][n].tolist()} == {tuple(e) for e in edges.tolist()}
    assert [0, *np.cumsum(observations["job_nodes"][n])] == list(row.dag_ptr)
    assert observations["stages"][n].tolist() == list(row.schedulable_nodes)
    assert observations["caps"][n].tolist() == list(row.commit_caps)
    assert observations["time_s"][n] == row.wall_time / 1000


def assert_equal_log(simulator: Simulator, cjs_logs: Path, logs: list[str]) -> None:
    """Replay logs side by side."""
    tables = [logged(cjs_logs, log, "decisions") for log in logs]
    actions = [table[["stage_idx", "num_exec"]].to_numpy() for table in tables]
    seen = [
        {row.step: row for row in logged(cjs_logs, log, "obs").itertuples()}
        if (cjs_logs / f"{log}_seed1_obs.parquet").exists() else {}
        for log in logs
    ]  # fmt: skip
    sums, rewards, told = ([[] for _ in logs] for _ in range(3))
    observations, over = simulator.reset([1] * len(logs)), np.zeros(len(logs), bool)
    for t in range(max(map(len, tables))):
        for n in np.flatnonzero(~over):
            sums[n].append(summed(observations, n))
            if t in seen[n]:
                assert_seen(observations, n, seen[n][t])
        act = np.array([played[t] if t < len(played) else (-1, 1) for played in actions])
        before = over
        observations, reward, over, info = simulator.step(act)
        over = over.copy()
        for n in np.flatnonzero(~before):
            rewards[n].append(reward[n])
            told[n].append([info[name][n] for name in TOLD])
    assert over.all() and [len(part) for part in rewards] == [len(table) for table in tables]
    jobs = simulator.jobs()
    for n, (log, table) in enumerate(zip(logs, tables, strict=True)):
        assert np.array_equal(told[n], table[list(TOLD)].to_numpy()), log
        np.testing.assert_allclose(np.array(rewards[n]) * 1000, table["reward"], rtol=1e-9, atol=1e-9)
        columns = ["n_nodes", "n_edges", "exec_mask_sum", *(f"fsum{k}" for k in range(5))]
        np.testing.assert_allclose(sums[n], table[columns].to_numpy(np.float64), rtol=1e-6, atol=1e-6)
        for name in ("t_arrival_ms", "t_completed_ms", "query_size", "num_tasks"):
            assert np.array_equal(jobs[name][n], logged(cjs_logs, log, "jobs")[name]), (log, name)
        starts_of_tasks = logged(cjs_logs, log, "tape")
        assert len(starts_of_tasks) == len(simulator.tape(n)["job_id"])
        for name, column in simulator.tape(n).items():
            assert np.array_equal(column, starts_of_tasks[name]), (log, name)


def test_decisions_of_deterministic_logs_give_their_numbers(tpch: Workload, cjs_logs: Path) -> None:
    simulator = Simulator(tpch, Rules(stream="median", order="ascending"), tape=True)
    assert_equal_log(simulator, cjs_logs, [f"det_{log}" for log in LOGS])


def test_decisions_of_a_log_with_random_streams_give_its_numbers(tpch: Workload, cjs_logs: Path) -> None:
    assert_equal_log(Simulator(tpch, tape=True), cjs_logs, ["fair"])


# Random streams -------------------------------------------------------------------------------------------------------


def twister(seed: int) -> np.ndarray:
    return np.array(random.Random(seed).getstate()[1], np.int64)


def test_the_twister_is_pythons() -> None:
    state, own = twister(7), random.Random(7)
    for count in list(range(1, 200)) * 5:  # enough to fill the state again
        assert streams.uniform(state) == own.random()
        assert streams.below(state, count) == own.choice(range(count))
    assert state.tolist() == list(own.getstate()[1])


@pytest.mark.parametrize("keys", [5, 30, 50, 300])
def test_sets_have_pythons_order(keys: int) -> None:
    rng = random.Random(keys)
    for _ in range(15):
        own: set[int] = set()
        size = streams.capacity(keys)
        table, spare, shape = np.full(size, -1, np.int16), np.zeros(size, np.int16), np.array([0, 0, 7])
        for _ in range(500):
            key = rng.randrange(keys)
            if key in own:
                own.remove(key)
                streams.discard(table, shape, key)
            else:
                own.add(key)
                streams.add(table, shape, key, spare)
            assert [e for e in table[: shape[2] + 1].tolist() if e >= 0] == list(own)


def test_policies_can_draw_from_the_published_stream() -> None:
    simulator = Simulator(CHAIN, Rules(jobs=3))
    simulator.reset([4, 5])
    own = [random.Random(4), random.Random(5)]
    for _ in range(3):
        assert simulator.uniforms().tolist() == [generator.random() for generator in own]


def test_the_counted_stream_is_uniform_and_depends_on_the_seed_alone() -> None:
    simulator = Simulator(CHAIN, Rules(jobs=3, stream="counted"))
    n = 2000
    simulator.reset(range(n))
    drawn = np.stack([simulator.uniforms() for _ in range(20)])
    assert drawn.min() >= 0 and drawn.max() < 1
    bins = np.histogram(drawn, 10, (0, 1))[0] * 10 / drawn.size
    assert np.abs(bins - 1).max() < 0.1
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.03  # neighbouring seeds
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.03  # neighbouring draws
    simulator.reset([7])
    assert [simulator.uniforms()[0] for _ in range(20)] == drawn[:, 7].tolist()


# Hand-made workloads --------------------------------------------------------------------------------------------------


def stage(tasks: int, ms: int = 100, children: tuple[int, ...] = (), levels: tuple[int, ...] = (5, 10)) -> Stage:
    """Tasks that take `ms` in first waves, 1 ms less later, 7 ms more with a fresh executor; 1000 ms more a level."""
    lists = [[[ms + 7 + 1000 * k], [ms + 1000 * k], [ms - 1 + 1000 * k] * (tasks - 1)] for k in range(len(levels))]
    return {"children": children, "levels": levels, "lists": lists}


def made(*jobs: list[Stage]) -> Workload:
    """A workload with one query for each job."""
    stages = [part for job in jobs for part in job]
    lists = [values for part in stages for level in part["lists"] for values in level]
    sizes = np.array([len(values) for values in lists])
    return prepare(
        Profiles(
            sizes=np.array(["2g"] * len(jobs)),
            queries=np.arange(len(jobs)) + 1,
            stage_start=starts([len(job) for job in jobs]),
            child_start=starts([len(part["children"]) for part in stages]),
            children=np.array([child for part in stages for child in part["children"]], np.int64),
            level_start=starts([len(part["levels"]) for part in stages]),
            levels=np.array([level for part in stages for level in part["levels"]]),
            list_start=starts(sizes)[:-1].reshape(-1, 3),
            list_size=sizes.reshape(-1, 3),
            durations=np.array([value for values in lists for value in values], np.float64),
        ),
        "hand-made",
    )


class Fixed(Simulator):
    """Job number j is template j and arrives when it is told to."""

    def __init__(self, workload: Workload, arrivals: list[float], executors: int, **rules: Any) -> None:
        settings: dict[str, Any] = {"stream": "median", "order": "ascending"} | rules
        super().__init__(workload, Rules(jobs=len(arrivals), executors=executors, **settings), tape=True)
        self.arrivals = arrivals

    def _sequence(self, seed: int) -> tuple[list[int], list[float]]:
        return [j % len(self.workload) for j in range(len(self.arrivals))], self.arrivals

    def play(self, *actions: tuple[int, int]) -> list[dict[str, Any]]:
        """Take decisions, then always the first stage with all executors; what was seen and decided at each."""
        observations, over, told = self.reset([0]), False, []
        while not over:
            action = actions[len(told)] if len(told) < len(actions) else (0, int(observations["committable"][0]))
            seen = {name: values[0] for name, values in observations.items()}
            observations, _, ended, info = self.step(np.array([action]))
            told.append(seen | {name: values[0] for name, values in info.items()})
            over = bool(ended[0])
        return told


def test_one_job_by_hand() -> None:
    """Executors move for 2 s; the first task of a fresh one takes 107 ms, the next 99 ms; the third is left for one."""
    simulator = Fixed(made([stage(3)]), [0.0], executors=2)
    (told,) = simulator.play((0, 2))
    assert told["time_s"] == 0 and told["limits"].tolist() == [2] and told["num_exec_committed"] == 2
    tape = simulator.tape(0)
    assert tape["t_start_ms"].tolist() == [2000, 2000, 2107]
    assert tape["executor_id"].tolist() == [0, 1, 0] and tape["num_local_execs"].tolist() == [1, 2, 2]
    assert tape["wave"].tolist() == ["fresh_durations", "fresh_durations", "rest_wave"]
    assert tape["duration_ms"].tolist() == [107, 107, 99]
    assert simulator.jobs()["t_completed_ms"].tolist() == [[2206]]
    assert simulator.observations["reward"].tolist() == [-2.206]


def test_warm_up_where_nothing_was_measured_of_fresh_executors() -> None:
    part = stage(2)
    part["lists"] = [[[], first, rest] for _, first, rest in part["lists"]]
    simulator = Fixed(made([part]), [0.0], executors=1, warmup_ms=55.0, moving_delay_ms=10.0)
    simulator.play((0, 1))
    tape = simulator.tape(0)
    assert tape["duration_ms"].tolist() == [155, 99] and tape["warmup_added"].tolist() == [True, False]
    assert tape["wave"].tolist() == ["first_wave", "rest_wave"] and tape["t_start_ms"][0] == 10


@pytest.mark.parametrize(("mended", "far"), [(False, 0.8), (True, 0.2)])
def test_switch_reversed_levels(mended: bool, far: float) -> None:
    """Six executors are nearer to level 5 than to level 10."""
    for stream in ("published", "counted"):
        simulator = Fixed(made([stage(3000)]), [0.0], 6, stream=stream, reversed_levels=not mended)
        simulator.play((0, 6))
        tape = simulator.tape(0)
        share = (tape["level_key"][tape["num_local_execs"] == 6] == 10).mean()
        assert abs(share - far) < 0.04
    median = Fixed(made([stage(30)]), [0.0], 6, reversed_levels=not mended)
    median.play((0, 6))
    assert median.tape(0)["level_key"][-1] == (5 if mended else 10)


CHAIN = made([stage(1, children=(1,)), stage(2)])


@pytest.mark.parametrize("mended", [False, True])
def test_switch_common_waits(mended: bool) -> None:
    """One executor works on the first stage, the other rests in the common pool, and is wanted for the second."""
    told = Fixed(CHAIN, [0.0], 2, common_waits=not mended).play((0, 1), (-1, 1), (0, 1))
    sources = [step["source_job_id"] for step in told]
    assert sources == ([-1, -1, 0, -1] if mended else [-1, -1, 0])
    assert len({step["time_s"] for step in told[2:]}) == 1


@pytest.mark.parametrize("mended", [False, True])
def test_switch_early_commitment(mended: bool) -> None:
    """The second stage is offered once the first has all it needs, though that has not run yet."""
    told = Fixed(CHAIN, [0.0], 2, early_commitment=not mended).play((0, 1))
    assert (told[1]["time_s"] > 0) == mended and told[1]["extra"][-1, 6] == (not mended)


@pytest.mark.parametrize("mended", [False, True])
def test_switch_cold_release(mended: bool) -> None:
    """The executor waits in its job's pool for the next stage."""
    simulator = Fixed(CHAIN, [0.0], 1, cold_release=not mended)
    simulator.play()
    expected = "first_wave" if mended else "fresh_durations"
    assert simulator.tape(0)["wave"].tolist() == ["fresh_durations", expected, "rest_wave"]


@pytest.mark.parametrize("mended", [False, True])
def test_switch_stale_supply(mended: bool) -> None:
    """The first stage of the first job ends early, and its executor leaves; the second job arrives later."""
    workload = made([stage(1), stage(1, ms=3000)], [stage(1)])
    told = Fixed(workload, [0.0, 2500.0], 2, stale_supply=not mended).play((0, 1), (0, 1))
    assert told[2]["time_s"] == 2.5 and told[2]["committable"] == 1
    assert told[2]["jobs"][:, 0].tolist() == [1 if mended else 2, 0]


@pytest.mark.parametrize("mended", [False, True])
def test_switch_newest_backup(mended: bool) -> None:
    """The second executor leaves 50 ms later, and finds nothing to do, as the first needs 30 ms; two jobs wait."""
    workload = made([stage(3, ms=10)], [stage(1)], [stage(1)])
    simulator = Fixed(workload, [0.0, 50.0, 60.0], 2, newest_backup=not mended)
    told = simulator.play((0, 1), (0, 1), (-1, 1))
    assert [step["time_s"] for step in told[:3]] == [0, 0.05, 2.035] and told[1]["sel_job_id"] == 0
    tape = simulator.tape(0)
    assert tape["job_id"].tolist()[:4] == [0, 0, 0, 1 if mended else 2]
    assert tape["t_start_ms"][3] == 4050 and tape["executor_id"][3] == 1


def test_a_policy_that_leaves_all_executors_idle_ends_the_episode() -> None:
    simulator = Fixed(made([stage(1)], [stage(1)]), [0.0, 100.0], 2)
    told = simulator.play((-1, 1), (-1, 1))
    assert len(told) == 2 and np.isinf(simulator.jobs()["t_completed_ms"]).all()


# A user's mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [((3, 1), "-1 to 1 and 1 to 5"), ((-2, 1), "-1 to 1"), ((0, 0), "1 to 5"), ((1, 6), "1 to 5"), ((0, -1), "1 to 5")],
)
def test_impossible_actions_are_refused_and_change_nothing(action: tuple[int, int], message: str) -> None:
    simulator = Fixed(made([stage(2), stage(2)]), [0.0], 5)
    simulator.reset([0, 0])
    before = [array.copy() for array in simulator.episodes]
    with pytest.raises(UserError, match=f"episode 1.*{message}"):
        simulator.step(np.array([(0, 1), action]))
    assert all(np.array_equal(a, b) for a, b in zip(before, simulator.episodes, strict=True))
    with pytest.raises(UserError, match=r"shape \(2,\); expected \(2, 2\)"):
        simulator.step(np.array([0, 1]))
    simulator.step(np.array([(-1, 99), (1, 5)]))  # resting asks for no number of executors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jobs", 0), ("executors", 0), ("executors", -3), ("executors", 5001), ("arrival_rate", 0.0),
        ("arrival_rate", np.nan), ("arrival_rate", np.inf), ("moving_delay_ms", -1.0), ("moving_delay_ms", np.nan),
        ("warmup_ms", -1.0), ("warmup_ms", np.inf), ("stream", "numpy"), ("order", "random"),
    ],
)  # fmt: skip
def test_rules_that_no_cluster_can_run_by_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"rules.{name} is {value}; expected"):
        Rules(**{name: value})
