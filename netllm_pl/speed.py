"""How fast a task trains, decides and predicts.

Shapes: B batch, T tokens.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.hooks import RemovableHandle

from netllm_pl.acting import ActingTask, evaluating
from netllm_pl.backbone import Backbone
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.decision import DecisionTask
from netllm_pl.errors import UserError
from netllm_pl.frozen import SEEN
from netllm_pl.machine import peak_memory
from netllm_pl.quantize import weight_count
from netllm_pl.rollout import Array, Environment, Observations, Policy
from netllm_pl.task import NetTask
from netllm_pl.timing import Entry, Work, latency, measure, now, rate, seconds_of

# Training -------------------------------------------------------------------------------------------------------------


class StepTimer(Callback):
    """Times the steps of `fit` in blocks, and ends it when there are enough.

    Args:
        repeats: Blocks.
        warmup: Steps before them.
        least_s: A block ends at the first step after that many seconds.
    """

    def __init__(self, repeats: int, warmup: int, least_s: float) -> None:
        self.repeats, self.warmup, self.least_s = repeats, warmup, least_s
        self.steps = self.samples = self.tokens = 0
        self.first_s = 0.0
        self.compiled = 0  # graphs so far, when the first step was done
        self.blocks: list[tuple[float, int, int, int]] = []  # seconds, steps, samples, tokens
        self.device = torch.device("cpu")

    def start(self) -> None:
        """Start the clock: what follows is waited for until the first step."""
        self.clock = now()

    def count_tokens(self, module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Count what the language model reads, padding too (a hook before its forward)."""
        tokens = args[0] if args else named["tokens"]
        self.tokens += tokens.shape[0] * tokens.shape[1]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a step; at the end of a block note it."""
        self.steps += 1
        self.samples += len(next(iter(batch.values())))
        if self.steps == 1:
            self.first_s, self.device = now() - self.clock, pl_module.device
            self.compiled = compiled_graphs()
        if self.steps == self.warmup:
            self._restart()
        if self.steps <= self.warmup or now(wait=False) - self.clock < self.least_s:
            return
        self.blocks.append((now() - self.clock, self.steps - self.before, self.samples, self.tokens))
        self._restart()
        trainer.should_stop = len(self.blocks) == self.repeats

    def _restart(self) -> None:
        self.samples = self.tokens = 0
        self.before, self.clock = self.steps, now()


def training(
    task: NetTask, data: NetDataModule, repeats: int, quick: bool, settings: Mapping[str, Any]
) -> tuple[Entry, torch.device]:
    """Train as `fit` does, without validation, logs and checkpoints; return what was measured, and where.

    ``tflop_per_s`` counts two operations a weight and token in the forward pass, two more for the gradients of
    activations, and two more for those of the weights that learn; attention itself, encoder and head are left out.
    """
    # A GPU's allocator takes a few steps until it asks for nothing new.
    warmup = 2 if quick and not torch.cuda.is_available() else 5
    timer = StepTimer(repeats, warmup, least_s=0.5 if quick else 1.0)
    trainer = _trainer(timer, settings)
    hook: RemovableHandle | None = None
    if task.backbone is not None:
        hook = task.backbone.register_forward_pre_hook(timer.count_tokens, with_kwargs=True)
    gc.collect()  # earlier trainers refer to themselves, and to averages of weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timer.start()
    try:
        trainer.fit(task, datamodule=data)
    except torch.OutOfMemoryError as error:
        cure = "give a smaller --data.init_args.batch_size, or --model.init_args.backbone.checkpointing true"
        raise UserError(f"training ran out of memory; {cure}") from error
    finally:
        if hook is not None:
            hook.remove()
        data.trainer = None  # else the data keep the model in memory for as long as they live
    seconds, steps, samples, tokens = (np.array(column) for column in zip(*timer.blocks, strict=True))
    found: Entry = {
        "first_step_s": timer.first_s,
        "recompilations": compiled_graphs() - timer.compiled,
        "batch_samples": int(samples[0] // steps[0]),
        "steps_measured": int(steps.sum()),
        **rate((steps / seconds).tolist(), "steps"),
        **rate((samples / seconds).tolist(), "samples"),
    }
    if task.backbone is not None:
        found["tokens_per_sample"] = float(tokens.sum() / samples.sum())
        found |= rate((tokens / seconds).tolist(), "tokens")
        found |= rate((tokens / seconds * flop_per_token(task.backbone) / 1e12).tolist(), "tflop")
    return found | peak_memory(timer.device), timer.device


def training_batches(
    task: NetTask, data: NetDataModule, sizes: Sequence[int], repeats: int, quick: bool, settings: Mapping[str, Any]
) -> Entry:
    """Train with batches of other sizes, the smallest first, until one does not fit into memory.

    Args:
        task: Its layers are compiled anew for each size, if they are, so that none is of sizes that change.
        data: Its batch size is afterwards what it was.
        sizes: Samples of a batch.
        repeats: As in `training`.
        quick: As in `training`.
        settings: As in `training`.

    Returns:
        What the fastest size gave (an entry of `training`) as ``best``, and all of them ``by_batch``.
    """
    before, found = data.batch_size, {}
    try:
        for size in sorted(sizes):
            data.batch_size = size
            forget_shapes(task)
            try:
                found[str(size)], _ = training(task, data, repeats, quick, settings)
            except UserError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise
                break
    finally:
        data.batch_size = before
        forget_shapes(task)
    if not found:
        return {"out_of_memory": True}
    return {"best": max(found.values(), key=lambda entry: float(entry["samples_per_s"])), "by_batch": found}


def forget_shapes(task: NetTask) -> None:
    """Let compiled layers and captured training steps be made anew, for the shapes that come next."""
    if task.backbone is not None and task.backbone.config.compile:
        torch._dynamo.reset()
    if task.backbone is not None:
        task.backbone._graph = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiled_graphs() -> int:
    """Return how many graphs have been compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


class Staying(SingleDeviceStrategy):
    """Trains on one GPU and leaves the model there: bringing a large one to the CPU and back takes seconds."""

    def teardown(self) -> None:
        """End all but the model, and let go of the optimiser's state."""
        self.optimizers, self.lr_scheduler_configs = [], []
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def flop_per_token(backbone: Backbone) -> int:
    """Operations of a training step for a token: 4 a frozen weight, 6 a weight that learns."""
    return sum((6 if weight.requires_grad else 4) * weight_count(weight) for weight in backbone.model.parameters())


def _trainer(timer: StepTimer, settings: Mapping[str, Any]) -> Trainer:
    gpu = torch.cuda.is_available() and settings.get("accelerator", "auto") != "cpu"
    try:
        return Trainer(
            strategy=Staying(torch.device("cuda", torch.cuda.current_device())) if gpu else "auto",
            devices=1,
            max_epochs=-1,
            max_steps=10**9,  # the timer ends it
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[timer],
            **settings,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


# Use ------------------------------------------------------------------------------------------------------------------


SLOW = 2
"""Episodes behind the latency of what takes much longer than it has to."""
STEPS = 50
"""Steps of an episode that are played at most: some tasks' have thousands."""


def begin(env: Environment, policy: Policy, seeds: Sequence[int]) -> int:
    """Play episodes side by side as `netllm_pl.rollout.rollout` does, their first `STEPS` steps.

    Returns:
        How many decisions were taken.
    """
    observations = env.reset(seeds)
    if hasattr(policy, "watch"):
        policy.watch(env)
    policy.reset(len(seeds))
    over, decided = np.zeros(len(seeds), dtype=bool), 0
    for _ in range(STEPS):
        decided += int((~over).sum())
        observations, _, over, _ = env.step(np.asarray(policy.act(observations)))
        if over.all():
            break
    return decided


class Timed:
    """A policy that notes how long each decision takes.

    Args:
        policy: Who decides.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.policy.reset(n)

    def act(self, observations: Observations) -> Array:
        """Decide."""
        actions: list[Array] = []
        self.seconds.append(seconds_of(lambda: actions.append(self.policy.act(observations))))
        return actions[0]


def decisions(task: ActingTask, data: NetDataModule, repeats: int, again: bool = True) -> Entry:
    """Time the decisions of single episodes (`begin`), one a repeat, after an episode that does not count.

    A task that decides with a language model is also timed as a policy without a cache of keys and values pays:
    ``full_recomputation`` runs the whole episode so far for each decision, unless ``again`` is false.
    """
    kinds: dict[str, Callable[[], Policy]] = {"streaming": task.as_policy}
    if again and isinstance(task, DecisionTask):
        kinds["full_recomputation"] = partial(task.as_policy, streaming=False)
    env = data.simulator("test", "fixed")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(-1, repeats):
        for name, make in kinds.items():
            if name != "streaming" and repeat >= SLOW:
                continue
            timed = Timed(make())
            begin(env, timed, [max(repeat, 0)])
            seconds[name] += timed.seconds if repeat >= 0 else []
    return {name: latency(measured) for name, measured in seconds.items()}


def many_episodes(task: ActingTask, data: NetDataModule, episodes: int, repeats: int) -> Entry:
    """Time episodes that are played side by side (`begin`), simulator included."""
    env = data.simulator("test", "fixed")

    def play() -> float:
        return begin(env, task.as_policy(), range(episodes))

    work = {"rollout": Work("decisions", play)}
    return {"episodes": episodes} | measure(work, repeats, 0.0)["rollout"]


def predictions(task: NetTask, data: NetDataModule, repeats: int, quick: bool) -> Entry:
    """Time predictions of single samples of the test split, and of whole batches."""
    with evaluating(task), torch.inference_mode():
        ones = single_samples(task, data)
        for one in ones:
            task.predict_step(one, 0)
        measured = [
            seconds_of(partial(task.predict_step, one, 0)) for _ in range(repeats * (1 if quick else 5)) for one in ones
        ]
        batch = _samples(task, data, range(min(len(data.dataset("test")), data.eval_batch_size)))
        size = len(next(iter(batch.values())))

        def predict() -> float:
            task.predict_step(batch, 0)
            return size

        for _ in range(SEEN):  # behind which such batches are captured
            predict()
        rates = measure({"batch": Work("predictions", predict)}, repeats, 0.1 if quick else 1.0)["batch"]
    return {"single": latency(measured), "batched": {"batch_samples": size} | rates}


def switching(calls: Sequence[Callable[[], object]], rounds: int) -> Entry:
    """Measure what it costs to take turns, such as between tasks that share a language model.

    Args:
        calls: One request each.
        rounds: How often each is made in turn, and as often apart from the others.

    Returns:
        ``apart_ms`` and ``mixed_ms``, medians of one request each summed up, and ``switch_ms``: what one change costs.
    """
    apart: list[list[float]] = [[] for _ in calls]
    mixed: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):  # now one way and now the other: a machine that slows down does so to both
        for call, seconds in zip(calls, apart, strict=True):
            call()  # behind it there is nothing to change
            seconds.append(seconds_of(call))
        for call, seconds in zip(calls, mixed, strict=True):
            seconds.append(seconds_of(call))
    sums = [1000 * sum(map(median, times)) for times in (apart, mixed)]
    return {"apart_ms": sums[0], "mixed_ms": sums[1], "switch_ms": (sums[1] - sums[0]) / len(calls)}


def single_samples(task: NetTask, data: NetDataModule) -> list[Batch]:
    """Return the first ten samples of the test split on the task's device, each a batch of its own."""
    return [_samples(task, data, range(k, k + 1)) for k in range(min(len(data.dataset("test")), 10))]


def _samples(task: NetTask, data: NetDataModule, indices: range) -> Batch:
    return {name: value.to(task.device) for name, value in data.dataset("test")[list(indices)].items()}
