"""What the benchmark measures of scheduling."""

import pytest

from netllm_pl.benchmark import ratios
from netllm_pl.timing import known, measure
from tasks.job_scheduling import JobSchedulingData, speed
from tasks.job_scheduling.planning import Lookahead, Planner
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.speed import EPISODES, works
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate


def simulator(rules: Rules) -> Simulator:
    return Simulator(generate(SyntheticWorkload(queries=2, sizes=("2g",))), rules)


def test_works_count_what_they_do() -> None:
    small = simulator(Rules(jobs=6, executors=9))
    found = works(small, Lookahead(jobs=1, shares=(1.0,), horizon_s=5.0))
    assert not any(work.beside or work.known for work in found.values())
    assert [found[name].run() for name in ("reset", "fair_kernel", "lookahead")] == [1, 1, EPISODES]
    apart = [found["step_1_episode"].run() for _ in range(EPISODES)]
    assert found[f"step_{EPISODES}_episodes"].run() == sum(apart) and len({*apart}) > 1


def test_the_planner_is_measured_as_it_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Lookahead] = []

    def watched(lookahead: Lookahead) -> Planner:
        measured.append(lookahead)
        return Planner(lookahead)

    monkeypatch.setattr(speed, "Planner", watched)
    own = Lookahead(jobs=1, horizon_s=5.0, extra=3)
    JobSchedulingData(
        synthetic=SyntheticWorkload(queries=2, sizes=("2g",)), rules=Rules(jobs=6, executors=9), lookahead=own
    ).benchmarks()
    assert measured == [Lookahead(jobs=1, horizon_s=5.0)]


def test_published_figures_stand_beside_the_published_setting() -> None:
    found = works(simulator(Rules()))
    measured = {"works": measure(found, repeats=1, least_s=0.0)}
    assert measured["works"]["published_reset"] == {"resets_per_s": 1 / 1.7}
    beside = ratios(measured, found)
    assert {*beside} == {
        "step_1_episode_to_published_step", f"step_{EPISODES}_episodes_to_published_step", "reset_to_published_reset",
        "fair_kernel_to_published_fair",
    }  # fmt: skip
    assert beside["fair_kernel_to_published_fair"]["ratio"] > 20
    assert beside["reset_to_published_reset"]["ratio"] > 100


def test_known_rates_are_not_measured() -> None:
    assert measure({"elsewhere": known("steps", 5.0)}, repeats=2, least_s=0.0) == {"elsewhere": {"steps_per_s": 5.0}}
