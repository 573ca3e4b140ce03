"""Fast paths of use: fixed places, merged adapters and compiled layers give the answers of the plain path.

Shapes: N sessions, T steps, C choices.
"""

import gc
from functools import cache
from itertools import pairwise
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from netllm_pl import cpu_decoder, streaming
from netllm_pl.data import Batch
from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.rollout import Array, Rollout, rollout
from netllm_pl.streaming import StaticPolicy
from netllm_pl.testing import tiny_backbone
from netllm_pl.toy import Candidates, CandidateTask
from tasks.adaptive_bitrate import AdaptiveBitrate
from tasks.adaptive_bitrate.simulator import Rules, Simulator
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.videos import generated_video

STEPS = 16
SEEDS = (0, 1, 2)
ALL: dict[str, Any] = {"returns": True, "actions": True}


@cache
def simulator() -> Simulator:
    return Simulator(generate(SyntheticTraces(traces=3), "test"), generated_video(), Rules(chunks=STEPS + 1), "fixed")


def make(architecture: str = "llama", backbone: dict[str, Any] | None = None, **settings: Any) -> AdaptiveBitrate:
    """A task with random weights, the same for the same settings; LoRA's are no longer zero, as after training."""
    torch.manual_seed(0)
    config = tiny_backbone(architecture, **(backbone or {}))
    task = AdaptiveBitrate(backbone=config, lookahead=0, width=16, **({"return_scale": 10.0} | settings))
    learn(task)
    return task.eval()


def learn(task: Any) -> None:
    """Change the adapters in place, as an optimiser does."""
    with torch.no_grad():
        for name, weight in task.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5 * torch.randn_like(weight))


def held(stream: streaming.Stream) -> list[int]:
    """Addresses of the weights of linear layers that a stream reads."""
    if stream.decoder is None:
        return [weight.data_ptr() for weight in stream.model.parameters()]
    return [linear[0].ctypes.data for layer in stream.decoder.layers for linear in layer[4:]]


class Scores:
    """Keeps the scores of each step; a mixin of policies."""

    def reset(self, n: int) -> None:
        super().reset(n)  # type: ignore[misc]
        self.scores: list[Array] = []

    def _choose(self, scores: Any, batch: Batch) -> Tensor:
        self.scores.append(scores[:, 0].float().cpu().numpy())
        chosen: Tensor = super()._choose(scores, batch)  # type: ignore[misc]
        return chosen


class Plain(Scores, LanguageModelPolicy):
    pass


class Static(Scores, StaticPolicy):
    pass


def play(policy: Plain | Static, seeds: Any = SEEDS) -> tuple[Array, Rollout]:
    played = rollout(simulator(), policy, seeds)
    return np.stack(policy.scores, axis=1), played


def same(task: AdaptiveBitrate, atol: float = 1e-5) -> Array:
    """Check that both paths play the same; return the scores."""
    (expected, played), (scores, again) = play(Plain(task)), play(Static(task, capture=False))
    assert streaming._STREAMS[task], "the static path was not taken"
    np.testing.assert_allclose(scores, expected, rtol=0, atol=atol)
    assert np.array_equal(played.actions, again.actions)
    assert scores.std(axis=1).min() > 1e-3, "decisions do not depend on the step"
    return scores


# Few tokens on a CPU --------------------------------------------------------------------------------------------------


def published_weights(task: AdaptiveBitrate) -> None:
    """Round the frozen weights to bfloat16, in which language models are published."""
    for weight in task.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16().float()


def test_few_episodes_take_the_layers_for_few_tokens_and_many_do_not() -> None:
    task = make(context=5)
    rollout(simulator(), task.as_policy(), [0])
    (stream,) = streaming._STREAMS[task]
    assert stream.decoder is not None
    many = task.as_policy()
    rollout(simulator(), many, range(cpu_decoder.MOST + 1))
    assert streaming._STREAMS[task] == [stream] and many.cached is not None, "the plain path was taken"


def test_weights_that_bfloat16_holds_are_kept_in_it_without_loss() -> None:
    """Those of one frozen weight once; others stay as they are."""
    task, other = make(context=5), make(context=5)
    published_weights(task)
    same(task)
    same(other)
    decoders: list[Any] = [streaming._STREAMS[made][0].decoder for made in (task, other)]
    stored = [{linear[0].dtype.name for linear in decoder.layers[0][4:]} for decoder in decoders]
    assert stored == [{"uint16"}, {"float32"}], "LoRA is not merged, which would make float32 of q and v"
    places = sorted(linear[0].ctypes.data for layer in decoders[0].layers for linear in layer[4:])
    sizes = {linear[0].ctypes.data: linear[0].nbytes for layer in decoders[0].layers for linear in layer[4:]}
    assert all(later - place == sizes[place] for place, later in pairwise(places)), "one behind the other"
    copies = len(cpu_decoder._PACKED)
    play(Static(task, False), [0])
    assert len(cpu_decoder._PACKED) == copies and len(streaming._STREAMS[task]) == 2


def test_what_was_made_in_one_precision_is_not_used_in_another() -> None:
    task = make(context=5)
    play(Static(task, False), [0])
    (stream,) = streaming._STREAMS[task]
    arrays = dict(stream.parcel.host)
    assert stream.fits(arrays)
    with torch.autocast("cpu", torch.bfloat16):
        assert not stream.fits(arrays)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True},
                {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}],
)  # fmt: skip
def test_layers_of_another_kind_are_found_out(changes: dict[str, Any]) -> None:
    task = make(backbone={"config": changes}, context=5)
    for name, weight in task.backbone.model.named_parameters():  # type: ignore[union-attr]
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    same(task)
    known = streaming._STREAMS[task][0].decoder is not None
    assert known == (changes.get("hidden_act") is None)


# Decisions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_layers", [True, False])
@pytest.mark.parametrize("context", [1, 5, 20])
@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        *(("llama", extra) for extra in ({}, {"returns": True}, {"actions": True}, ALL)),
        *((name, ALL) for name in ("mistral", "qwen2", "gpt2", "opt")),
    ],
)
def test_decisions_are_those_of_the_plain_path(
    architecture: str, extra: dict[str, Any], context: int, own_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over sessions that are longer than the ring, and shorter; by the layers for few tokens, and transformers' own."""
    known = architecture in cpu_decoder.ARCHITECTURES
    if own_layers and not known:
        pytest.skip(f"{architecture} always takes the layers of transformers")
    monkeypatch.setattr(cpu_decoder, "MOST", 3 * 4 if own_layers else 0)
    task = make(architecture, context=context, target_return=-5.0, **extra)
    same(task)
    (stream,) = streaming._STREAMS[task]
    assert (stream.decoder is not None) == own_layers
    assert own_layers or stream.shared_heads == (2 if known else 1), "keys and values are not copied for each head"


def test_with_published_tokens_and_no_adapter() -> None:
    same(make(context=5, tokens="published", **ALL))
    same(make(backbone={"lora": None}, context=5))


def test_actions_that_are_drawn_are_remembered() -> None:
    scores = same(make(context=5, actions=True, sample=True))
    assert not np.array_equal(
        play(Static(make(context=5, actions=True, sample=True), False))[1].actions.T, scores.argmax(-1)
    )


def test_sessions_start_anew_with_what_was_learned_since() -> None:
    """Nothing of earlier sessions is left in the ring, and merged weights follow the adapters; frozen ones stay."""
    task = make(context=5, **ALL)
    frozen = {name: weight.clone() for name, weight in task.named_parameters() if not weight.requires_grad}
    first = same(task)
    (stream,) = streaming._STREAMS[task]
    np.testing.assert_array_equal(first, same(task))
    learn(task)
    assert np.abs(same(task) - first).max() > 1e-2
    assert streaming._STREAMS[task] == [stream], "what was built is used again"
    assert all(torch.equal(weight, dict(task.named_parameters())[name]) for name, weight in frozen.items())
    parameters = dict(task.named_parameters())
    assert all(parameters[name].grad is None for name in frozen)


def test_what_is_around_the_model_compiles_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for captured decisions on a GPU, without generating kernels."""
    monkeypatch.setattr(cpu_decoder, "MOST", 0)
    task = make(context=5, tokens="published", **ALL)
    expected, played = play(Static(task, capture=False))
    (stream,) = streaming._STREAMS[task]
    torch._dynamo.reset()
    counters.clear()
    stream.read = torch.compile(stream._read, dynamic=False, backend="aot_eager")
    stream.remember.function = torch.compile(stream._remember, dynamic=False, backend="aot_eager")
    scores, again = play(Static(task, capture=False))
    assert streaming._STREAMS[task] == [stream]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert np.array_equal(played.actions, again.actions)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("most", [0, 16])
def test_other_numbers_of_sessions_have_their_own_stream(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decoder, "MOST", most)
    task = make(context=5, **ALL)
    together = same(task)
    for seed in SEEDS:
        alone = play(Static(task, False), [seed])[0]
        np.testing.assert_allclose(alone, together[seed : seed + 1], rtol=0, atol=1e-5)
    assert [len(stream.parcel.host["step"]) for stream in streaming._STREAMS[task]] == [1, 3]
    one, other = (held(stream) for stream in streaming._STREAMS[task])
    assert one and one == other, "weights exist once, merged ones too"


@pytest.mark.parametrize("most", [0, cpu_decoder.MOST])
def test_a_task_that_is_done_with_is_forgotten(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decoder, "MOST", most)
    task = make(**ALL)
    play(Static(task, capture=False), SEEDS[:1])
    assert streaming._STREAMS[task]
    alive = ref(task)
    del task
    gc.collect()
    assert alive() is None


def test_in_training_and_in_inference_mode() -> None:
    """Validation plays in inference mode, a test later outside; training goes on afterwards."""
    task = make(context=5, **ALL)
    expected = play(Plain(task))[0]
    task.train()
    with torch.inference_mode():
        np.testing.assert_allclose(play(Static(task, False))[0], expected, rtol=0, atol=1e-5)
    assert task.training
    np.testing.assert_allclose(play(Static(task, False))[0], expected, rtol=0, atol=1e-5)
    batch = task.observe(simulator().reset(SEEDS), 0)
    batch |= {"action": torch.zeros(3, 1, dtype=torch.long), "return_to_go": torch.zeros(3, 1)}
    task(batch).sum().backward()
    assert all(weight.grad is not None for name, weight in task.named_parameters() if "lora_B" in name)


def test_a_backbone_in_bfloat16_decides_alike() -> None:
    task = make(backbone={"dtype": "bfloat16"}, context=5, **ALL)
    (expected, _), (scores, _) = play(Plain(task)), play(Static(task, False))
    np.testing.assert_allclose(scores[:, :1], expected[:, :1], rtol=0, atol=0.05)
    assert (scores.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_learned_positions_have_an_end_here_too() -> None:
    for architecture, setting in (("gpt2", "n_positions"), ("opt", "max_position_embeddings")):
        same(make(architecture, {"config": {setting: 2 * STEPS}}, context=3))
        short = make(architecture, {"config": {setting: 2 * STEPS - 1}}, context=3)
        with pytest.raises(UserError, match="has learned positions for 31 tokens, token 32 came"):
            play(Static(short, False))


def test_steps_of_other_shapes_take_the_plain_path() -> None:
    torch.manual_seed(0)
    task, env = CandidateTask(tiny_backbone(), context=3).eval(), Candidates(5, steps=(4, 6))
    played = [rollout(env, task.as_policy(static=static), SEEDS).actions for static in (False, True)]
    assert np.array_equal(*played) and task not in streaming._STREAMS


def test_the_path_is_chosen_by_device_and_setting() -> None:
    task = make()
    assert type(task.as_policy(static=False)) is LanguageModelPolicy
    policy, forced = task.as_policy(), task.as_policy(static=True)
    assert isinstance(policy, StaticPolicy) and isinstance(forced, StaticPolicy)
    assert policy.few and not forced.few and not policy.capture, "on a CPU there are no graphs"
    assert type(task.as_policy(streaming=False, static=True)) is LanguageModelPolicy
