"""Decisions: answers with a key/value cache are those of full recomputation and of training; what they depend on.

Shapes: N sessions, T steps, C choices.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from netllm_pl.acting import Objective
from netllm_pl.backbone import Backbone
from netllm_pl.data import Batch
from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.recording import Experience
from netllm_pl.rollout import Array, Observations, Rollout, rollout
from netllm_pl.testing import check_task, tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData, HindsightMLP
from tasks.adaptive_bitrate.simulator import Rules, Simulator
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.task import mismeasured, rescaled
from tasks.adaptive_bitrate.videos import generated_video

STEPS = 24
ARCHITECTURES = ("llama", "mistral", "qwen2", "gpt2", "opt")
SEEDS = (0, 1, 2)
ALL: dict[str, Any] = {"returns": True, "actions": True}
TOKENS = ("compact", "published")
LAYOUTS = [
    *((name, tokens, extra) for name in ("llama", "gpt2") for tokens in TOKENS for extra in ({}, ALL)),
    *((name, "compact", ALL) for name in ("mistral", "qwen2", "opt")),
]


@cache
def simulator(steps: int = STEPS) -> Simulator:
    return Simulator(generate(SyntheticTraces(traces=3), "test"), generated_video(), Rules(chunks=steps + 1), "fixed")


def make(architecture: str = "llama", backbone: dict[str, Any] | None = None, **settings: Any) -> AdaptiveBitrate:
    """A task with random weights, the same for the same settings; LoRA's are no longer zero, as after training."""
    torch.manual_seed(0)
    config = tiny_backbone(architecture, **(backbone or {}))
    task = AdaptiveBitrate(backbone=config, lookahead=0, width=16, **({"return_scale": 10.0} | settings))
    for name, weight in task.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return task.eval()


class Watched(LanguageModelPolicy):
    """Keeps the scores, the wanted returns and what the cache holds after each step."""

    def reset(self, n: int) -> None:
        super().reset(n)
        self.scores: list[Array] = []
        self.asked: list[Array] = []
        self.held: list[int] = []

    def act(self, observations: Observations) -> Array:
        actions = super().act(observations)
        self.asked.append(self.wanted)
        if self.streaming and self.task.context > 1:
            assert self.cached is not None
            lengths = {layer.keys.shape[-2] for layer in self.cache.layers}  # type: ignore[union-attr]
            assert lengths == {len(self.cached)}
            self.held.append(len(self.cached))
        return actions

    def _choose(self, scores: Any, batch: Batch) -> Tensor:
        self.scores.append(scores[:, 0].float().cpu().numpy())
        return super()._choose(scores, batch)


def play(task: AdaptiveBitrate, streaming: bool = True, seeds: Any = SEEDS) -> tuple[Array, Rollout, Watched]:
    """Return scores (N, T, C), what happened, and the policy."""
    policy = Watched(task, streaming)
    played = rollout(simulator(), policy, seeds, record=True)
    return np.stack(policy.scores, axis=1), played, policy


@cache
def recorded() -> Rollout:
    """Sessions with drawn levels, for tests in which it does not matter who played."""
    return play(make(sample=True))[1]


def episode(task: AdaptiveBitrate, played: Rollout) -> Batch:
    """The recorded sessions as one training batch, each a window (N, T) as a whole."""
    columns = {**played.observations, "action": played.actions}
    batch = {name: torch.as_tensor(value).transpose(0, 1) for name, value in columns.items()}
    received = np.concatenate([np.zeros_like(played.rewards[:1]), played.rewards[:-1]]).cumsum(0)
    batch["return_to_go"] = torch.as_tensor(task.target_return - received).T.float()
    batch["step"] = torch.arange(STEPS).expand(batch["level"].shape)
    batch["mask"] = torch.ones_like(batch["step"], dtype=torch.bool)
    return batch


@torch.no_grad()
def scores_of(task: AdaptiveBitrate, batch: Batch) -> Tensor:
    scores: Tensor = task(batch)
    return scores


def close(one: Any, two: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=0, atol=atol)


# Streaming, recomputation and training give the same answers ----------------------------------------------------------


@pytest.mark.parametrize("context", [1, 5, 20])
@pytest.mark.parametrize(("architecture", "tokens", "extra"), LAYOUTS)
def test_streaming_equals_the_training_pass(
    architecture: str, tokens: Any, extra: dict[str, Any], context: int
) -> None:
    """Over a recorded session that is longer than the context; and the cache holds no more than that needs."""
    task = make(architecture, tokens=tokens, context=context, target_return=-5.0, **extra)
    scores, played, policy = play(task)
    assert scores.std(axis=1).min() > 1e-3, "decisions do not depend on the step"
    close(scores, scores_of(task, episode(task, played)))
    per_step = (2 if tokens == "compact" else 6) + 2 * bool(extra)
    steps = np.arange(1, STEPS + 1)
    held = np.minimum(steps, context) * per_step - 1 if extra else np.minimum(steps, context - 1) * per_step
    assert policy.held == (held.tolist() if context > 1 else [])


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [*(("llama", extra) for extra in ({}, {"returns": True}, {"actions": True})), *((n, ALL) for n in ARCHITECTURES)],
)
def test_streaming_equals_recomputation(architecture: str, extra: dict[str, Any]) -> None:
    task = make(architecture, context=5, **extra)
    (scores, played, _), (again, replayed, _) = play(task), play(task, streaming=False)
    close(scores, again)
    assert np.array_equal(played.actions, replayed.actions)


def test_sampled_sessions_are_those_of_recomputation() -> None:
    """Action tokens are of what was drawn, not of what scored best."""
    task = make(context=5, actions=True, sample=True)
    (scores, played, _), (again, replayed, _) = play(task), play(task, streaming=False)
    assert np.array_equal(played.actions, replayed.actions)
    assert not np.array_equal(played.actions.T, scores.argmax(-1))
    close(scores, again)


@pytest.mark.parametrize("context", [3, 40])
def test_attention_implementations_agree(context: int) -> None:
    sdpa, eager = (make(backbone={"attention": name}, context=context) for name in ("sdpa", "eager"))
    (scores, played, _), (others, _, _) = play(sdpa), play(eager)
    close(scores, others)
    close(scores, scores_of(eager, episode(eager, played)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_backbone_in_bfloat16_streams(attention: str) -> None:
    """Encoders and head stay in float32; no more is lost than the frozen type loses."""
    task = make(backbone={"attention": attention, "dtype": "bfloat16"}, context=5, **ALL)
    scores, played, _ = play(task)
    batch = episode(task, played)
    assert scores.dtype == np.float32
    close(scores, scores_of(task, batch), atol=0.05)
    task.train()
    values = torch.randn(*batch["action"].shape, 6)
    task.loss(task(batch), batch | {"values": values}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


# What a decision depends on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("context", "layers"), [(1, 2), (4, 1)])
def test_a_layer_sees_the_steps_of_the_context(architecture: str, context: int, layers: int) -> None:
    """Through several layers a decision hears of older steps from nearer ones."""
    task = make(architecture, {"layers": layers}, context=context)
    batch = episode(task, recorded())
    other = batch | {"buffer_s": batch["buffer_s"].clone()}
    other["buffer_s"][:, 0] += 5.0
    difference = (scores_of(task, batch) - scores_of(task, other)).abs().amax((0, 2))
    assert (difference[:context] > 1e-6).all()
    assert (difference[context:] == 0).all()


@pytest.mark.parametrize("context", [3, 20])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture: str, context: int) -> None:
    """Windows of different lengths from the middle of a session; padding is zero, as data gives it, or anything."""
    task = make(architecture, context=context, **ALL)
    whole = {name: value[:, 6:18] for name, value in episode(task, recorded()).items()}
    for real in (1, 7):
        short = {name: value[:, :real] for name, value in whole.items()}
        zero = {name: torch.cat([value[:, :real], 0 * value[:, real:]], dim=1) for name, value in whole.items()}
        other = zero | {"buffer_s": whole["buffer_s"], "step": whole["step"]}
        for padded in (zero, other):
            close(scores_of(task, short), scores_of(task, padded)[:, :real])
            close(scores_of(task, whole)[:2, :real], scores_of(task, {n: v[:2] for n, v in padded.items()})[:, :real])


def test_padding_is_not_learned_from() -> None:
    task = make(context=20)
    batch = {name: value[:, :8] for name, value in episode(task, recorded()).items()}
    batch["values"] = torch.randn(3, 8, 6)
    batch["mask"] = torch.arange(8).expand(3, 8) < torch.tensor([[8], [5], [1]])
    noisy = batch | {"values": batch["values"] + 7 * ~batch["mask"][..., None] * torch.randn(3, 8, 6)}
    noisy["action"] = torch.where(batch["mask"], batch["action"], 5 - batch["action"])
    scores = scores_of(task, batch)
    objectives: tuple[Objective, ...] = ("values", "imitation")
    for objective in objectives:
        task.objective = objective
        assert task.loss(scores, batch) == task.loss(scores, noisy)
    measured = []
    for shown in (batch, noisy):
        metrics = task.build_metrics()
        task.update_metrics(metrics, scores, shown)
        measured.append({name: float(value) for name, value in metrics.compute().items()})
    assert measured[0] == measured[1]


def test_other_sessions_change_nothing() -> None:
    task = make("gpt2", context=5, **ALL)
    together = play(task)[0]
    for seed in SEEDS:
        close(together[seed : seed + 1], play(task, seeds=[seed])[0])


def test_received_rewards_are_taken_from_the_target() -> None:
    task = make(context=3, returns=True, target_return=7.5, return_scale=50.0)
    scores, played, policy = play(task)
    received = np.concatenate([np.zeros((1, len(SEEDS))), played.rewards[:-1]]).cumsum(0)
    close(policy.asked, 7.5 - received, atol=1e-9)
    assert not np.allclose(scores, play(make(context=3, returns=True, target_return=-60.0, return_scale=50.0))[0])


# Choosing -------------------------------------------------------------------------------------------------------------


def test_drawn_actions_follow_the_softmax() -> None:
    task, generator = make(), np.random.default_rng(0)
    scores = np.array([0.3, -1.0, IMPOSSIBLE, 2.0, IMPOSSIBLE, 0.0], np.float32)
    drawn = task.choose(torch.from_numpy(np.tile(scores, (40_000, 1, 1))), {}, generator)[:, 0]
    share = np.bincount(drawn, minlength=6) / len(drawn)
    np.testing.assert_allclose(share, torch.from_numpy(scores).softmax(0), atol=0.01)
    assert share[[2, 4]].tolist() == [0.0, 0.0]
    assert task.choose(torch.from_numpy(scores[None, None]), {}).tolist() == [[3]]


def test_drawing_is_repeatable() -> None:
    task = make(sample=True)
    first, again = (play(task)[1].actions for _ in range(2))
    assert np.array_equal(first, again)
    assert len(np.unique(first)) > 1
    policy = Watched(task)
    later = [rollout(simulator(), policy, SEEDS).actions for _ in range(2)]
    assert np.array_equal(later[0], first) and not np.array_equal(later[1], first), "new sessions, new draws"


# Training after use, and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_trains_after_it_was_used(architecture: str) -> None:
    """Nothing of inference mode is left in it, it is in training mode again; recomputed activations change nothing."""
    grads = []
    for checkpointing in (False, True):
        task = make(architecture, {"checkpointing": checkpointing}, context=5, **ALL).train()
        for module in task.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "embed_dim"):  # OPT keeps its rates as numbers
                setattr(module, "dropout", 0.0)  # noqa: B010  # not declared by nn.Module
        scores, played, _ = play(task)
        assert task.training
        batch = episode(task, played) | {"values": torch.arange(6.0).expand(3, STEPS, 6)}
        prediction = task(batch)
        close(scores, prediction.detach())
        task.loss(prediction, batch).backward()
        grads.append({name: p.grad for name, p in task.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert grad is not None and grad.count_nonzero()
        torch.testing.assert_close(grad, grads[1][name])


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["level", "throughput", "step", "return_to_go", "action", "upcoming_mb"])
def test_missing_columns_are_named(column: str) -> None:
    task = make(**ALL)
    batch = episode(task, recorded())
    task.lookahead = 5 if column == "upcoming_mb" else 0
    with pytest.raises(UserError, match=f"no column {column}"):
        task({name: value for name, value in batch.items() if name != column})


def test_values_and_rewards_that_are_missing_are_named() -> None:
    task = make()
    batch = episode(task, recorded())
    with pytest.raises(UserError, match="collect with --values"):
        task.loss(scores_of(task, batch), batch)
    observations = simulator().reset(SEEDS)
    del observations["reward"]
    for returns in (False, True):
        policy = make(returns=returns).as_policy()
        policy.reset(len(SEEDS))
        if not returns:
            assert policy.act(observations).shape == (3,), "a reward is needed for the return only"
            continue
        with pytest.raises(UserError, match="no 'reward' of the last step"):
            policy.act(observations)


@pytest.mark.parametrize(("name", "value"), [("levels", 4), ("history", 5), ("lookahead", 3)])
def test_data_of_another_shape_are_refused(name: str, value: int) -> None:
    env = Simulator(simulator().traces, simulator().video, lookahead=5)
    for task in (AdaptiveBitrate(tiny_backbone(), **{name: value}), HindsightMLP(**{name: value})):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"the data has {name} \d+, the model {value}; train one with"):
            rollout(env, task.as_policy(), [0])


def test_backbones_that_cannot_decide_are_refused() -> None:
    with pytest.raises(UserError, match="needs a causal model"):
        AdaptiveBitrate(tiny_backbone("t5"))
    with pytest.raises(UserError, match="context is 0"):
        make(context=0)
    with pytest.raises(UserError, match="return_scale is 0"):
        make(return_scale=0)
    with pytest.raises(UserError, match=r"(?i)flash"):
        AdaptiveBitrate(tiny_backbone(attention="flash_attention_2"))
    task = make()
    assert task.backbone is not None
    task.backbone.model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="flash_attention_2 takes no mask of its own; set it to sdpa"):
        play(task)


@pytest.mark.parametrize(("architecture", "setting"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_learned_positions_have_an_end(architecture: str, setting: str) -> None:
    """Told at the step that does not fit; as many as there are can be used."""
    fits = make(architecture, {"config": {setting: 2 * STEPS}}, context=3)
    close(play(fits)[0], scores_of(fits, episode(fits, play(fits)[1])))
    short = make(architecture, {"config": {setting: 2 * STEPS - 1}}, context=3)
    with pytest.raises(UserError, match=f"{architecture} has learned positions for 47 tokens, token 48 came"):
        play(short)
    with pytest.raises(UserError, match="learned positions for 47 tokens"):
        short(episode(fits, play(fits)[1]))
    config = replace(tiny_backbone(architecture, config={setting: 8}), lora=None)
    with pytest.raises(UserError, match="learned positions for 8 tokens, token 9 came"):
        Backbone(config)(torch.zeros(1, 9, 32))


# The tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_the_contract_with_other_tokens() -> None:
    """The choices that are no Literal, which tests of all tasks leave as they are."""
    data = AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=3, duration_s=60),
        experience=Experience(policies="bba", episodes=4, eval_episodes=2, values="hindsight"),
        rules=Rules(chunks=8), window=6, batch_size=4,
    )  # fmt: skip
    check_task(AdaptiveBitrate, data, backbone=tiny_backbone(), context=3, sample=True, **ALL)


def test_rescaled_sessions_take_as_long() -> None:
    torch.manual_seed(0)
    env = Simulator(simulator().traces, simulator().video, lookahead=5)
    seen = [env.reset(range(400)), env.step(np.ones(400, np.int64))[0]]
    batch = {name: torch.as_tensor(np.stack([s[name] for s in seen], axis=1)) for name in seen[0]}
    changed = rescaled(batch, 0.2)
    sized = ("throughput", "next_bytes", "upcoming_mb")
    factors = [(changed[name] / batch[name]).flatten(1).nanmedian(1).values for name in sized]
    close(factors[0], factors[1])
    close(factors[0], factors[2])
    assert 0.17 < factors[0].log().std() < 0.23 and abs(factors[0].log().mean()) < 0.03
    for name, value in batch.items():
        expected = value * factors[0].view(-1, *[1] * (value.dim() - 1)) if name in sized else value
        torch.testing.assert_close(changed[name], expected, check_dtype=name not in sized, rtol=1e-5, atol=1e-6)
    assert all(value is batch[name] for name, value in changed.items() if name not in sized)


def test_half_of_the_windows_are_measured_badly_in_training() -> None:
    torch.manual_seed(0)
    chunk = torch.arange(1.0, 13.0).unfold(0, 5, 1).expand(2000, -1, -1)  # the chunk that each measurement is of
    batch = {"throughput": chunk, "delay_s": 4 / chunk, "buffer_s": torch.ones(2000, 8)}
    assert mismeasured(batch, 0.0) is batch
    changed = mismeasured(batch, 0.6)
    torch.testing.assert_close(changed["throughput"] * changed["delay_s"], torch.full((2000, 8, 5), 4.0))
    assert changed["buffer_s"] is batch["buffer_s"]
    factors = changed["throughput"] / chunk
    torch.testing.assert_close(factors[:, 1:, :-1], factors[:, :-1, 1:])  # a chunk keeps its factor
    spread = factors[:, ::4].flatten(1).log().std(1)
    assert float((spread > 1e-4).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(spread[spread > 1e-4].mean()) == pytest.approx(0.3, rel=0.1) and spread.max() < 1.2
    for kind in (AdaptiveBitrate, HindsightMLP):
        with pytest.raises(UserError, match=r"model.noise is -1"):
            kind(noise=-1.0)
