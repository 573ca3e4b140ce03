"""The way in which NetLLM's published code runs, re-stated on a task of ours, to hold our speed against.

The same tokens, language model and adapters; float32 without TF32, one sample a step, activations recomputed, and no
cache: each decision runs its whole context again, and each answer of a prediction is a pass of its own over all before
it. What is left out is in its favour: it also computes logits over a vocabulary and stores each adapter with the model.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from netllm_pl.acting import ActingTask, evaluating
from netllm_pl.backbone import checkpoint_activations
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.decision import DecisionTask, LanguageModelPolicy
from netllm_pl.frozen import inner_model
from netllm_pl.rollout import Observations
from netllm_pl.speed import SLOW, Timed, begin, single_samples, training
from netllm_pl.task import NetTask
from netllm_pl.timing import Entry, latency, seconds_of


def can_restate(task: NetTask) -> bool:
    """Whether there is such a way: baselines have no language model, and quantised weights are no longer known."""
    acts_otherwise = isinstance(task, ActingTask) and not isinstance(task, DecisionTask)
    return task.backbone is not None and task.backbone.config.quantize is None and not acts_otherwise


def published_style(
    task: NetTask, data: NetDataModule, repeats: int, quick: bool, settings: Mapping[str, Any]
) -> Entry:
    """Measure a copy of a task in the published way: ``training``, and ``decision`` or ``prediction``.

    Args:
        task: On the CPU; it stays as it is.
        data: Its data.
        repeats: Measurements behind each median.
        quick: Measure for a shorter time.
        settings: Of the trainer; not its precision.
    """
    own = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    twin = restated(task)
    settings = {name: value for name, value in settings.items() if name != "precision"}
    with _full_precision(), _one_at_a_time(data):
        trained, device = training(twin, data, repeats, quick, settings)
        twin.to(device).eval()
        if device.type == "cuda":  # the task itself may lie there, too
            trained["peak_memory_gb"] -= own
        found: Entry = {"training": trained}
        if isinstance(twin, DecisionTask):
            found["decision"] = latency(_decisions(twin, data, repeats))
            found["decision"]["decisions_per_s"] = 1000 / found["decision"]["median_ms"]
        else:
            found["prediction"] = latency(_predictions(twin, data, repeats))
    return found


def restated(task: NetTask) -> NetTask:
    """Copy a task to float32, with activations recomputed in training, and nothing compiled or captured."""
    twin = copy.deepcopy(task).float()
    assert twin.backbone is not None
    twin.backbone.config = replace(
        twin.backbone.config, dtype="float32", checkpointing=True, compile=False, graphs=False, training_graph=False
    )
    checkpoint_activations(inner_model(twin.backbone))
    return twin


class Recomputing(LanguageModelPolicy):
    """Runs the steps of the context, the current one included, anew for each decision.

    Args:
        task: The adapted language model.
    """

    def __init__(self, task: DecisionTask) -> None:
        super().__init__(task, streaming=False)

    def _decide(self, seen: Observations) -> torch.Tensor:
        self.history = self.history[-self.task.context + 1 :] if self.task.context > 1 else []
        return super()._decide(seen)


def one_by_one(task: NetTask, batch: Batch) -> Any:
    """Predict a batch with one pass of the language model for each answer, each over all tokens before it."""
    assert task.backbone is not None
    prompt = task.encode(batch)
    states = []
    for answer in prompt.answers.tolist():
        mask = None if prompt.mask is None else prompt.mask[..., : answer + 1]
        states.append(task.backbone(prompt.tokens[:, : answer + 1], mask)[:, -1])
    return task.answer(torch.stack(states, dim=1), batch)


def _decisions(task: DecisionTask, data: NetDataModule, repeats: int) -> list[float]:
    env, seconds = data.simulator("test", "fixed"), []
    for repeat in range(-1, min(repeats, SLOW)):
        timed = Timed(Recomputing(task))
        begin(env, timed, [max(repeat, 0)])
        seconds += timed.seconds if repeat >= 0 else []
    return seconds


def _predictions(task: NetTask, data: NetDataModule, repeats: int) -> list[float]:
    ones, seconds = single_samples(task, data), []
    with evaluating(task), torch.inference_mode():
        for repeat in range(-1, min(repeats, SLOW)):
            for one in ones:
                took = seconds_of(lambda one=one: one_by_one(task, one))  # type: ignore[misc]
                seconds += [took] if repeat >= 0 else []
    return seconds


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _one_at_a_time(data: NetDataModule) -> Iterator[None]:
    before = data.batch_size
    data.batch_size = 1
    try:
        yield
    finally:
        data.batch_size = before
