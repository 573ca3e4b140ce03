"""One episode of a cluster with Gymnasium's interface."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from netllm_pl.errors import UserError
from tasks.job_scheduling.environment import JobSchedulingEnv
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate
from tasks.job_scheduling.workloads import Workload

RULES = Rules(jobs=4, executors=7)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return generate(SyntheticWorkload(queries=3, sizes=("2g", "5g")))


@pytest.mark.parametrize("stream", ["published", "counted", "median"])
def test_environment_passes_the_checker(workload: Workload, stream: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|render modes|A Box)")
        check_env(JobSchedulingEnv(workload, Rules(jobs=4, executors=7, stream=stream)))


def test_environment_equals_simulator(workload: Workload) -> None:
    env, simulator = JobSchedulingEnv(workload, RULES), Simulator(workload, RULES)
    expected = simulator.reset([77])
    observation, info = env.reset(seed=77)
    assert info["seed"] == 77
    total, over = 0.0, False
    env.action_space.seed(0)
    while not over:
        assert observation in env.observation_space
        assert np.array_equal(observation["graph"].nodes[:, :5], expected["nodes"][0])
        assert np.array_equal(observation["graph"].nodes[:, 5:], expected["extra"][0])
        assert np.array_equal(observation["graph"].edge_links, expected["edges"][0])
        for name in ("jobs", "committable", "source", "time_s", "reward"):
            assert np.array_equal(observation[name], expected[name][0])
        for name in ("stages", "limits", "heights"):
            assert np.array_equal(info[name], expected[name][0])
        assert np.array_equal(observation["jobs"][:, 6], expected["job_nodes"][0])
        action = env.action_space.sample()
        action["stage_idx"] = max(action["stage_idx"], 0)
        expected, rewards, _, decided = simulator.step(np.array([[action["stage_idx"], action["num_exec"]]]))
        observation, reward, over, cut, info = env.step(action)
        assert reward == rewards[0] == observation["reward"] and not cut
        assert all(info[name] == values[0] for name, values in decided.items())
        total += reward
    times = simulator.jobs()
    assert over == simulator.over[0]
    assert total == pytest.approx((times["t_arrival_ms"] - times["t_completed_ms"]).sum() / 1000)


def test_all_that_the_action_space_holds_is_possible_and_nothing_else(workload: Workload) -> None:
    env = JobSchedulingEnv(workload, RULES)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        env.action_space.seed(seed)
        drawn, over = [], False
        while not over and len(drawn) < 50:
            action = env.action_space.sample()
            assert action in env.action_space
            drawn.append((int(action["stage_idx"]) < 0, int(action["num_exec"])))
            _, _, over, _, info = env.step(action)
        assert len({*drawn}) > 3
    observation, info = env.reset(seed=0)
    for stage, executors in ((len(info["stages"]), 1), (-2, 1), (0, 0), (0, observation["committable"] + 1)):
        action = {"stage_idx": np.int64(stage), "num_exec": np.int64(executors)}
        assert action not in env.action_space
        with pytest.raises(UserError, match="not possible"):
            env.step(action)


def test_episodes_are_chosen_by_seed_or_option(workload: Workload) -> None:
    env = JobSchedulingEnv(workload, RULES)

    def arrivals() -> list[float]:
        return list(env.simulator.jobs()["t_arrival_ms"][0])

    env.reset(seed=3)
    third = arrivals()
    drawn = [env.reset() and arrivals() for _ in range(5)]
    assert len({*map(tuple, drawn)}) == 5 and third not in drawn
    env.reset(seed=3)
    env.reset(options={"episode": 3})
    assert arrivals() == third
    assert [env.reset() and arrivals() for _ in range(5)] == drawn
