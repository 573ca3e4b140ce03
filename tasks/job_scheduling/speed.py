"""What the benchmark measures of scheduling beside the task: simulator and planner."""

from collections.abc import Callable
from itertools import count

from netllm_pl.timing import Work, known
from tasks.job_scheduling.heuristics import SCHEMES, Heuristic, play_all
from tasks.job_scheduling.planning import Lookahead, Planner
from tasks.job_scheduling.simulator import Simulator
from tasks.job_scheduling.state import DONE

PUBLISHED = {"step": ("decisions", 1 / 0.62e-3), "reset": ("resets", 1 / 1.7), "fair": ("episodes", 1 / 4.3)}
"""Pieces a second of spark-sched-sim as NetLLM's `run_baseline` runs it, Fair on 200 jobs and 50 executors: 0.62 ms a
decision, 1.7 s a reset, 4.3 s an episode with its 3.9 thousand decisions, on one idle core."""
PUBLISHED_JOBS, PUBLISHED_EXECUTORS = 200, 50
EPISODES = 8


def works(simulator: Simulator, lookahead: Lookahead | None = None) -> dict[str, Work]:
    """List what is measured.

    * ``step_<n>_episodes``: decisions of Fair through `Simulator.step`, n episodes side by side, resets and
      observations included.
    * ``reset``: resets of one episode.
    * ``fair_kernel``: episodes of Fair, resets included, in the kernel that planners continue episodes with.
    * ``lookahead``: decisions in mid-episode for which all candidates were looked at.
    * ``published_...``: rates of the published simulator, measured elsewhere; only beside the same number of jobs and
      executors.

    Args:
        simulator: Its jobs and rules.
        lookahead: How it is looked ahead.
    """
    own = [Simulator(simulator.workload, simulator.rules, simulator.first_seed) for _ in range(5)]
    found = {
        "step_1_episode": Work("decisions", _stepped(own[0], 1)),
        f"step_{EPISODES}_episodes": Work("decisions", _stepped(own[1], EPISODES)),
        "reset": Work("resets", _reset(own[2])),
        "fair_kernel": Work("episodes", _played(own[3])),
        "lookahead": Work("decisions", _looked(own[4], lookahead or Lookahead())),
    }
    rules = simulator.rules
    if (rules.jobs, rules.executors) != (PUBLISHED_JOBS, PUBLISHED_EXECUTORS):
        return found
    for name, work in found.items():
        kind = name.split("_")[0]
        if kind in PUBLISHED:
            found[name] = Work(work.unit, work.run, f"published_{kind}")
    return found | {f"published_{kind}": known(*figure) for kind, figure in PUBLISHED.items()}


def _stepped(simulator: Simulator, episodes: int) -> Callable[[], int]:
    first = count(step=episodes)

    def play() -> int:
        start = next(first)
        observations = simulator.reset(range(start, start + episodes))
        policy, decisions = Heuristic(SCHEMES["fair"]), 0
        policy.watch(simulator)
        while not simulator.over.all():
            decisions += int((~simulator.over).sum())
            observations = simulator.step(policy.act(observations))[0]
        return decisions

    return play


def _reset(simulator: Simulator) -> Callable[[], int]:
    seeds = count()

    def reset() -> int:
        simulator.reset([next(seeds)])
        return 1

    return reset


def _played(simulator: Simulator) -> Callable[[], int]:
    seeds, scheme = count(), SCHEMES["fair"].parameters()

    def play() -> int:
        simulator.reset([next(seeds)])
        play_all(simulator.episodes, simulator.plan, scheme, 0, 1)
        return 1

    return play


def _looked(simulator: Simulator, lookahead: Lookahead) -> Callable[[], int]:
    planner, policy = Planner(lookahead), Heuristic(SCHEMES["srpt_fair"])
    observations = simulator.reset(range(EPISODES))
    planner.watch(simulator)
    policy.watch(simulator)
    while (simulator.episodes.glob[:, DONE] < simulator.rules.jobs // 2).all():
        observations = simulator.step(policy.act(observations))[0]

    def look() -> int:
        planner.look()
        return EPISODES

    return look
