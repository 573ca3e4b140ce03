"""Looking ahead: it changes nothing in what is played, finds better decisions, and says what decisions are worth.

Shapes: N episodes, C candidates.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from netllm_pl.errors import UserError
from netllm_pl.rollout import Observations, rollout
from netllm_pl.testing import check_environment
from tasks.job_scheduling.batch import pick
from tasks.job_scheduling.heuristics import SCHEMES, Heuristic, Scheme, adviser
from tasks.job_scheduling.planning import Lookahead, Planner, Valued
from tasks.job_scheduling.simulator import EXTRA_FEATURES, JOB_FEATURES, Rules, Simulator
from tasks.job_scheduling.state import ACTIVE, BASE, BUSY, PROFILE, STAGES, TARGET, UNFINISHED
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate
from tasks.job_scheduling.workloads import Workload

AHEAD = Lookahead(extra=4)
RULES = Rules(jobs=6, executors=8, arrival_rate=1e-4)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return generate(SyntheticWorkload(queries=5, sizes=("2g", "10g")))


def simulator(workload: Workload, rules: Rules = RULES) -> Simulator:
    return Simulator(workload, rules, adviser=adviser(AHEAD.scheme))


def walk(env: Simulator | Valued, seeds: range, explore: float = 0.5) -> Iterator[Observations]:
    """Play until all episodes are over, with random decisions among the scheme's; give what is seen before each."""
    rng = np.random.default_rng(0)
    seen = env.reset(seeds)
    while not env.over.all():
        yield seen
        random = rng.random(len(seeds)) < explore
        seen = env.step(np.where(random[:, None], env.sample(seen, rng), seen["advice"]))[0]


def copies(env: Simulator) -> list[np.ndarray]:
    return [np.array(array) for array in env.episodes]


@pytest.mark.parametrize("stream", ["published", "counted", "median"])
def test_the_episode_stays_as_it_is(stream: str, workload: Workload) -> None:
    """Every array of its state; whatever the copy draws, it does not draw from the episode."""
    env = simulator(workload, replace(RULES, stream=stream))  # type: ignore[arg-type]
    planner = Planner(AHEAD)
    looked = 0
    for step, _ in enumerate(walk(env, range(3))):
        planner.watch(env) if step == 0 else None
        before = copies(env)
        looked += planner.look()[2].sum()
        for one, two in zip(before, copies(env), strict=True):
            assert np.array_equal(one, two, equal_nan=True)
    assert looked > 100


def test_what_is_told_of_running_tasks(workload: Workload) -> None:
    """Expected ends go by medians of profiles; any task that runs is given a quarter of its median at least."""
    env = simulator(workload)
    overdue = 0
    for seen in walk(env, range(3)):
        for n in np.flatnonzero(~env.over):
            ep = pick(env.episodes, n)
            now, row = ep.clock[0], 0
            for j in ep.active[: ep.glob[ACTIVE]]:
                first = []
                for s in range(ep.jobs[j, BASE], ep.jobs[j, BASE] + ep.jobs[j, STAGES]):
                    if not ep.stages[s, UNFINISHED]:
                        continue
                    tasks = ep.task[(ep.executors[:, BUSY] == 1) & (ep.executors[:, TARGET] == s)]
                    ends = np.maximum(tasks.sum(1), now + tasks[:, 1] / 4) - now
                    overdue += int((tasks.sum(1) < now).sum())
                    told = dict(zip(EXTRA_FEATURES, seen["extra"][n][row], strict=True))
                    assert told["running"] == len(ends)
                    wanted = (ends.min(initial=np.inf), ends.mean()) if len(ends) else (0.0, 0.0)
                    np.testing.assert_allclose([told["first_end_s"], told["mean_end_s"]], np.divide(wanted, 1e3), 1e-5)
                    medians = workload.medians[ep.stages[s, PROFILE]]
                    for name, place in (("usual_5_s", (0, 2)), ("usual_50_s", (4, 2)), ("usual_fresh_s", (4, 0))):
                        usual = ep.recent[s] if np.isnan(medians[place]) else medians[place]
                        assert told[name] == np.float32(usual / 1e3)
                    first += ends.tolist()
                    row += 1
                soon = seen["jobs"][n][list(ep.active).index(j), JOB_FEATURES.index("first_end_s")]
                np.testing.assert_allclose(soon, min(first, default=0.0) / 1e3, 1e-5)
    assert overdue > 20


def test_it_does_not_know_when_running_tasks_end(workload: Workload) -> None:
    """Drawn durations of running tasks are the future; only what is usual, and that a task still runs, is known."""
    env = simulator(workload, replace(RULES, moving_delay_ms=0.0))
    planner, checked = Planner(AHEAD), 0
    for step, _ in enumerate(walk(env, range(3))):
        planner.watch(env) if step == 0 else None
        ep = env.episodes
        found = planner.look()
        before = ep.due.copy()
        ep.due[:] = ep.clock + 3 * (ep.due - ep.clock)  # in the same order; moves are due now
        for one, two in zip(found, planner.look(), strict=True):
            assert np.array_equal(one, two)
        checked += int((ep.due != before).sum())
        ep.due[:] = before
    assert checked > 100


def test_threads_and_company_do_not_change_the_answer(workload: Workload) -> None:
    env = simulator(workload)
    planners = [Planner(AHEAD, threads) for threads in (1, 2, 5, 100)]
    alone = simulator(workload)
    for step, _ in enumerate(walk(env, range(5))):
        found = []
        for planner in planners:
            planner.watch(env) if step == 0 else None
            found.append(planner.look())
        for other in found[1:]:
            assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))
        if step == 0:
            for n in range(5):
                alone.reset([n])
                single = Planner(AHEAD, 1)
                single.watch(alone)
                assert all(np.array_equal(one[0], many[n]) for one, many in zip(single.look(), found[0], strict=True))


def test_candidates_are_possible_and_differ(workload: Workload) -> None:
    """The first is the scheme's own; executors lie within what can be assigned; no candidate comes twice."""
    env, planner = simulator(workload), Planner(AHEAD)
    several = 0
    for step, seen in enumerate(walk(env, range(4))):
        planner.watch(env) if step == 0 else None
        tried, costs, counts = planner.look()
        assert (counts[env.over] == 0).all() and (counts[~env.over] >= 1).all()
        for n in np.flatnonzero(~env.over):
            rows = tried[n, : counts[n]]
            assert rows[0].tolist() == seen["advice"][n].tolist()
            assert (rows[:, 0] >= -1).all() and (rows[1:, 0] >= 0).all()
            assert (rows[:, 0] < len(seen["stages"][n])).all()
            assert (rows[:, 1] >= 1).all() and (rows[:, 1] <= seen["committable"][n]).all()
            done = {(k, min(count, seen["limits"][n][k]) if k >= 0 else 0) for k, count in rows.tolist()}
            assert len(done) == counts[n]
            assert np.isfinite(costs[n, : counts[n]]).all() and (costs[n, : counts[n]] > 0).all()
            several += counts[n] > 1
    assert several > 50


def test_costs_are_what_happens_if_nothing_is_random_and_nobody_comes(workload: Workload) -> None:
    """All jobs are there and durations are medians: with a long horizon, the scheme's own cost comes true.

    But for tasks that run already, which are given a quarter of their time at least.
    """
    rules = Rules(jobs=5, executors=8, arrival_rate=1e6, stream="median", order="ascending")
    env = simulator(workload, rules)
    planner = Planner(Lookahead(horizon_s=1e6))
    seen = env.reset(range(4))
    assert [len(jobs) for jobs in seen["jobs"]] == [1] * 4, "the first is there at time zero"
    later = 0
    while not env.over.all():
        if all(len(jobs) == 5 for jobs in seen["jobs"]):
            planner.watch(env)
            tried, costs, _ = planner.look()
            now = env.episodes.clock[:, 0].copy()
            assert np.array_equal(tried[:, 0], seen["advice"])
            later = 1
            break
        seen = env.step(seen["advice"])[0]
    assert later
    while not env.over.all():
        seen = env.step(seen["advice"])[0]
    spent_s = (env.jobs()["t_completed_ms"] - now[:, None]).sum(1) / 1000
    np.testing.assert_allclose(costs[:, 0], spent_s, rtol=5e-3)


def test_the_planner_is_better_than_what_it_looks_ahead_with(workload: Workload) -> None:
    """In the mean of the same episodes, with random durations and arrivals that it cannot know."""
    rules = Rules(jobs=12, executors=10, arrival_rate=2e-4)
    means = []
    for policy in (Heuristic(SCHEMES["srpt_fair"]), Planner(Lookahead(scheme=SCHEMES["srpt_fair"]))):
        env = Simulator(workload, rules)
        rollout(env, policy, range(24))
        jobs = env.jobs()
        means.append((jobs["t_completed_ms"] - jobs["t_arrival_ms"]).mean(1) / 1000)
    gain = means[0] - means[1]
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)) > 0


def test_a_margin_keeps_to_the_scheme(workload: Workload) -> None:
    decided = []
    for margin in (0.0, 0.02, 1.0):
        env = simulator(workload)
        played = rollout(env, Planner(replace(AHEAD, extra=0, margin=margin)), range(4), record=True)
        other = (played.actions != played.observations["advice"]).any(-1)[played.alive]
        decided.append(other.mean())
    assert decided[0] > decided[1] > decided[2] == 0


def test_values_are_what_candidates_lose_against_the_best(workload: Workload) -> None:
    env = Valued(simulator(workload), AHEAD)
    seen = env.reset(range(4))
    plain = simulator(workload)
    plain.reset(range(4))
    worse = 0
    while not env.over.all():
        over, actions = env.over, seen["advice"].copy()
        tried, costs, counts = env.planner.look()
        (following, rewards, ended, info), (others, given, _, told) = env.step(actions), plain.step(actions)
        assert np.array_equal(rewards, given) and info.keys() == {*told, "values"}
        assert all(len(rows) == 0 for rows in info["values"][over])
        for n in np.flatnonzero(~over):
            values = info["values"][n]
            assert values.shape == (counts[n], 3) and values.dtype == np.float32
            assert values[0, :2].tolist() == seen["advice"][n].tolist()
            assert values[:, 2].max() == 0 and np.isfinite(values).all()
            best = tried[n, costs[n, : counts[n]].argmin()]
            assert values[values[:, 2].argmax(), :2].tolist() == best.tolist()
            worse += values[0, 2] < 0
        seen = following
        assert np.array_equal(ended, env.over) and np.array_equal(seen["time_s"], others["time_s"])
    assert worse > 10


def test_a_simulator_with_values_keeps_the_contract(workload: Workload) -> None:
    check_environment(Valued(simulator(workload), AHEAD), [3, 0, 7], lambda seen: seen["advice"])
    assert Valued(simulator(workload), Lookahead(Scheme())).rules == RULES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"horizon_s": -1.0}, "lookahead.horizon_s is -1.0; expected seconds above 0"),
        ({"jobs": 0}, "lookahead.jobs is 0; expected 1 or more"),
        ({"shares": ()}, r"lookahead.shares is \(\); expected one or more above 0, up to 1"),
        ({"shares": (0.5, 2.0)}, r"lookahead.shares is \(0.5, 2.0\); expected"),
    ],
)
def test_what_no_planner_can_do_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Lookahead(**changes)
