"""Cost beside size: the sizes that are taken, and that simulator and pools are measured at each of them."""

import os
from typing import Any

import pytest

from netllm_pl.errors import UserError
from netllm_pl.recording import Experience
from netllm_pl.scaling import EPISODES, STEPS, check, scaling, sizes
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.viewport_prediction import ViewportPredictionData


def streaming_data() -> AdaptiveBitrateData:
    return AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=4, duration_s=60), rules=Rules(chunks=22), window=8, batch_size=4,
        experience=Experience(policies="bba", episodes=8, eval_episodes=2, values="hindsight"),
    )  # fmt: skip


def test_sizes_grow_tenfold_up_to_the_limit() -> None:
    assert sizes(EPISODES, 5000) == [100, 1000]
    assert sizes(EPISODES, 10**9) == [100, 1000, 10_000, 100_000, 1_000_000]
    assert sizes(STEPS, 5000) == [] and sizes(STEPS, 10**8)[-1] == 10**7


@pytest.mark.usefixtures("own_cache")
def test_simulator_and_pools_are_measured_at_each_size() -> None:
    cache = os.environ["NETLLM_CACHE"]
    task = AdaptiveBitrate(tiny_backbone(), context=4, width=16)
    found = scaling(task, streaming_data(), 10_000)
    assert list(found["simulator"]) == ["episodes_100", "episodes_1000", "episodes_10000", "growth"]
    assert all(found["simulator"][f"episodes_{n}"]["us_per_step"] > 0 for n in (100, 1000, 10_000))
    first, last = (found["simulator"][f"episodes_{n}"]["us_per_step"] for n in (100, 10_000))
    assert found["simulator"]["growth"] == last / first < 3, "the cost of a step does not grow with their number"
    pool: dict[str, Any] = found["pool"]
    assert set(pool) == {"steps_10000", "gather_ms_growth", "training_step_ms_growth", "memory_trained_gb_growth"}
    assert pool["steps_10000"]["training_step_ms"] > pool["steps_10000"]["gather_ms"] > 0
    assert pool["memory_trained_gb_growth"] == 1
    assert os.environ["NETLLM_CACHE"] == cache and all(weight.grad is None for weight in task.parameters())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="has no simulator that plays many episodes"):
        check(ViewportPredictionData(), 1000)
    with pytest.raises(UserError, match="--scaling is 10; give the largest size, at least 100"):
        check(streaming_data(), 10)
