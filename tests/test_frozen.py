"""Compiled layers, merged adapters, captured predictions: the same numbers, and nothing is compiled again in a run."""

import gc
import re
import weakref
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from netllm_pl import cpu_decoder, frozen
from netllm_pl import task as task_module
from netllm_pl.attention import go_maskless
from netllm_pl.backbone import Backbone, LoRA
from netllm_pl.data import Batch
from netllm_pl.frozen import Predictor, frozen_copy, predict
from netllm_pl.graphs import Captured, LearningGraph, Places
from netllm_pl.joined import Part
from netllm_pl.recording import Experience
from netllm_pl.rollout import rollout
from netllm_pl.shared import held_bytes
from netllm_pl.testing import tiny_backbone
from netllm_pl.toy import CandidateData, CandidateTask
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.viewport_prediction import ViewportPrediction

NO_DROPOUT = LoRA(rank=4, dropout=0.0)


def learn(module: nn.Module, size: float = 0.3) -> None:
    """Change the adapters in place, as an optimiser does."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B" in name or "head" in name:
                weight.add_(size * torch.randn_like(weight))


def twins(architecture: str = "llama", **changes: Any) -> tuple[Backbone, Backbone]:
    """The same model twice, the second one compiled; in training, without dropout."""
    made = []
    for compiled in (False, True):
        config = tiny_backbone(architecture, lora=NO_DROPOUT, compile=compiled, **changes)
        made.append(Backbone(config).train())
    learn(made[0])
    made[1].load_state_dict(made[0].state_dict())
    for model in made:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "embed_dim"):  # OPT keeps its rates as numbers
                setattr(module, "dropout", 0.0)  # noqa: B010  # not declared by nn.Module
    return made[0], made[1]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Trace and differentiate as for a GPU, without generating kernels; yields what was compiled."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: plain(self, backend="aot_eager", **given))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def graphs(compiled: dict[str, Any]) -> int:
    assert not compiled["graph_break"] and not compiled["recompile_limit"]
    return int(compiled["stats"]["unique_graphs"])


# Compiled layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_learn_alike(architecture: str, checkpointing: bool, compiled: dict[str, Any]) -> None:
    """All layers are one compilation; validation, whose shapes differ, adds none."""
    plain, fast = twins(architecture, checkpointing=checkpointing)
    gradients = []
    tokens = torch.randn(4, 12, 32, requires_grad=True)
    for model in (plain, fast):
        for _ in range(2):
            model.zero_grad()
            tokens.grad = None
            model(tokens).square().mean().backward()
        assert tokens.grad is not None
        found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        gradients.append(found | {"tokens": tokens.grad.clone()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    for model in (fast.eval(), fast.train()):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens[:3, :7]), plain(tokens[:3, :7]), rtol=0, atol=1e-5)
    assert graphs(compiled) == 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gpt2", "opt"])
def test_a_captured_step_learns_alike_without_a_mask(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on a GPU runs here as it is; heads that share keys and values, too."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, samples, **given: module)
    model = twins(architecture)[0]
    tokens = torch.randn(4, 12, 32, requires_grad=True)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    plain = model(tokens)
    expected = torch.autograd.grad(plain.square().mean(), [tokens, *learning])
    seen: list[Any] = []
    for name in ("netllm_pl_causal", "sdpa"):
        attend = ALL_ATTENTION_FUNCTIONS[name]
        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping, name,
            lambda *given, name=name, attend=attend, **more: seen.append((name, given[4])) or attend(*given, **more),
        )  # fmt: skip
    assert go_maskless(model.model, True)
    found = LearningGraph(model.model)(tokens, None, torch.arange(12)[None])
    assert found is not None and set(seen) == {("netllm_pl_causal", None), ("sdpa", None)}
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(found.square().mean(), [tokens, *learning])
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_passes_with_and_without_a_mask_take_turns() -> None:
    """In any order, and recomputed in the backward pass; other implementations of attention keep their masks."""
    model = twins(checkpointing=True)[0]
    tokens, whole = torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    narrow = whole.triu(-1)
    learning = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients(*masks: Tensor | None) -> list[Tensor]:
        return list(torch.autograd.grad(sum(model(tokens, mask).square().mean() for mask in masks), learning))

    apart = [gradients(mask) for mask in (whole, narrow)]
    for masks in ((None, narrow), (narrow, None)):
        for together, one, other in zip(gradients(*masks), *apart, strict=True):
            torch.testing.assert_close(together, one + other, rtol=1e-4, atol=1e-6)
    padded = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(model(tokens, padded), model(tokens), rtol=0, atol=1e-5)
    assert model.model.config._attn_implementation == "netllm_pl_causal"
    assert not go_maskless(model.model, False) and model.model.config._attn_implementation == "sdpa"
    assert not go_maskless(Backbone(tiny_backbone(attention="eager")).model, True)
    mistral = Backbone(tiny_backbone("mistral", config={"sliding_window": 5})).model
    assert go_maskless(mistral, True, 4) and not go_maskless(mistral, True, 5)


def streaming_data(**settings: Any) -> AdaptiveBitrateData:
    return AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=4, duration_s=60),
        experience=Experience(policies="bba", episodes=12, eval_episodes=3, values="hindsight"),
        rules=Rules(chunks=12), window=8, batch_size=4, eval_batch_size=5, **settings,
    )  # fmt: skip


def fit(task: Any, data: Any, steps: int) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=steps // 2, check_val_every_n_epoch=None,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)


@pytest.mark.usefixtures("own_cache")
def test_a_run_with_validation_and_rollouts_compiles_once(compiled: dict[str, Any]) -> None:
    fit(AdaptiveBitrate(tiny_backbone(compile=True), context=5, width=16), streaming_data(), 12)
    assert graphs(compiled) == 1


@pytest.mark.usefixtures("own_cache")
def test_batches_of_many_shapes_compile_three_times_at_most(compiled: dict[str, Any]) -> None:
    """First as they come, then with as many rows, then of any length."""
    fit(CandidateTask(tiny_backbone(compile=True), context=3), CandidateData(), 16)
    assert 1 <= graphs(compiled) <= 3


@pytest.mark.usefixtures("own_cache")
def test_a_compiled_policy_decides_alike(compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decoder, "MOST", 0)  # which takes other layers
    data = streaming_data()
    torch.manual_seed(0)
    task = AdaptiveBitrate(tiny_backbone(compile=True), context=3, width=16, returns=True, actions=True).eval()
    learn(task)
    env = data.simulator("test")
    played = [rollout(env, task.as_policy(static=static), [0, 1]).actions for static in (False, True, True)]
    assert (played[0] == played[1]).all() and (played[0] == played[2]).all()
    assert graphs(compiled) == 1


# The optimiser --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fused_optimiser_learns_alike_and_gradients_are_clipped(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used on a GPU, here on a CPU."""
    plain, learned = task_module.adamw, []
    for fused in (False, True):
        monkeypatch.setattr(task_module, "adamw", lambda groups, config, fused, own=fused: plain(groups, config, own))
        pl.seed_everything(0, verbose=False)
        task = AdaptiveBitrate(tiny_backbone(lora=NO_DROPOUT), width=16, rescale=0.0)
        trainer = pl.Trainer(
            accelerator="cpu", precision=precision, max_steps=3, gradient_clip_val=0.1, limit_val_batches=0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task, datamodule=streaming_data())
        optimizer = trainer.optimizers[0]
        assert bool(optimizer.param_groups[0]["fused"]) is fused
        learned.append({name: weight.detach() for name, weight in task.named_parameters() if weight.requires_grad})
    for name, weight in learned[0].items():
        torch.testing.assert_close(learned[1][name], weight, rtol=1e-4, atol=1e-6)


# Merged adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "t5"])
def test_merged_adapters_give_the_same_states(architecture: str) -> None:
    backbone = Backbone(tiny_backbone(architecture)).eval()
    learn(backbone)
    tokens = torch.randn(2, 9, 32)
    model = frozen_copy(backbone)
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    with torch.no_grad(), backbone.replaced(model):
        merged = backbone(tokens)
    assert not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged, backbone(tokens), rtol=0, atol=1e-5)
    assert all(torch.equal(weight, backbone.state_dict()[name]) for name, weight in before.items())
    frozen = {name: weight for name, weight in backbone.named_parameters() if "lora_" not in name}
    copied = [weight.nbytes for name, weight in frozen.items() if re.search("[qkv]_proj|base_layer.weight", name)]
    more = held_bytes([backbone, model]) - held_bytes([backbone])
    assert more == sum(copied), "what is not adapted, nor read together with what is, exists once"


def test_layers_are_joined_once_for_all_copies() -> None:
    backbone = Backbone(tiny_backbone()).eval()
    tokens = torch.randn(2, 9, 32)
    with torch.no_grad():
        plain = backbone(tokens)
        first, second = frozen_copy(backbone), frozen_copy(backbone)
        held = held_bytes([backbone, first])
        assert held_bytes([backbone, first, second]) == held
        for model in (first, second, first):
            with backbone.replaced(model):
                torch.testing.assert_close(backbone(tokens), plain, rtol=0, atol=1e-5)
        parts = [part for part in first.modules() if isinstance(part, Part)]
        assert len(parts) == 2 * (3 + 2), "q, k, v and gate, up of two layers"
        assert all(part.joined.source is None and not part.joined.parts for part in parts), "nothing is kept"
        one, other = parts[:2]
        alone = one(tokens), other(2 * tokens), one(tokens)
    assert torch.equal(alone[0], alone[2]), "each layer takes the input that it gets"
    assert not torch.equal(alone[1], other(tokens))


def test_weights_that_move_or_are_exchanged_are_seen() -> None:
    backbone = Backbone(tiny_backbone())
    learn(backbone)
    places = Places(backbone)
    assert places.hold(), "learning in place moves nothing"
    norm, weight = backbone.get_submodule("model.base_model.model.norm"), "weight"
    before = norm.get_parameter(weight)
    norm.register_parameter(weight, nn.Parameter(before.detach()))
    assert not places.hold()
    norm.register_parameter(weight, before)
    assert places.hold()
    before.data = before.data.clone()  # as .to(device) does
    assert not places.hold()
    places = Places(backbone)
    backbone.add_module("more", nn.Linear(1, 1))
    assert not places.hold()


# Captured predictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"mirror_average": True}, {"decoding": "autoregressive", "representation": "absolute"}]
)
def test_captured_predictions_are_the_same(settings: dict[str, Any]) -> None:
    """The code that a graph is captured from, on this CPU without one."""
    torch.manual_seed(0)
    task = ViewportPrediction(tiny_backbone(), horizon=6, width=16, **settings).eval()
    assert task.fixed
    learn(task, 0.05)
    predictor = Predictor(task, batch(), capture=False)
    for _ in range(2):
        for seed in range(2):
            with torch.inference_mode():
                expected = task(batch(seed))
                torch.testing.assert_close(predictor(batch(seed)), expected, rtol=1e-5, atol=1e-4)
                assert torch.equal(predict(task, batch(seed)), expected), "no graph on a CPU"
        learn(task, 0.05)


def batch(seed: int = 0) -> Batch:
    walk: Tensor = torch.randn(3, 10, 3, generator=torch.Generator().manual_seed(seed)).cumsum(1) * 5
    return {"history": walk}


def test_encoder_and_head_are_compiled_around_the_language_model(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two graphs without breaks, for any number of predictions; the task is not kept alive by them."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: plain(function, **{"backend": "eager"} | given))
    monkeypatch.setattr(frozen, "compile_layers", lambda model, dynamic: None)
    monkeypatch.setattr(frozen, "Captured", lambda function, capture: Captured(function, False))
    task = ViewportPrediction(tiny_backbone(compile=True), width=16).eval()
    batches = [{"history": torch.randn(1, 10, 3).cumsum(1)} for _ in range(3)]
    with torch.inference_mode():
        predictor = Predictor(task, batches[0], capture=True)
        for batch in batches:
            torch.testing.assert_close(predictor(batch), task(batch), rtol=1e-5, atol=1e-5)
    assert graphs(compiled) == 2 and "encode" not in vars(task)
    frozen._PREDICTORS[task] = {"shape": predictor}
    gone = weakref.ref(task)
    del task, predictor
    gc.collect()
    assert gone() is None


class Fused(CandidateTask):
    """Learns with the optimiser that a GPU has."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, fused=True)


def test_merged_weights_follow_a_fused_optimiser() -> None:
    """It changes weights without counting their versions; text and playing went on with old ones."""
    task = Fused(tiny_backbone(lora=NO_DROPOUT))
    assert task.backbone is not None
    merged = frozen.merged_of(task.backbone)
    before = [weight.clone() for weight in merged.weights.values()]
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, CandidateData())
    after = frozen.merged_of(task.backbone)
    assert after is merged
    assert all(not torch.equal(one, other) for one, other in zip(before, after.weights.values(), strict=True))
