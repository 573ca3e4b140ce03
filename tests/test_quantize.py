"""Quantised backbones: close to what they were, small in memory, and trained, stored and refused like others.

Shapes: B batch, T tokens.
"""

import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from netllm_pl import errors
from netllm_pl.backbone import Backbone, BackboneConfig
from netllm_pl.benchmark import describe
from netllm_pl.checkpoint import check_identity, load_task, read_checkpoint
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.quantize import parts_of, weight_bytes, weight_count
from netllm_pl.recording import Experience
from netllm_pl.speed import flop_per_token
from netllm_pl.testing import check_task, tiny_backbone
from netllm_pl.toy import CandidateData, CandidateTask

ROOT = Path(__file__).parent.parent
BITS = ("int8", "nf4")
ERROR = {"int8": 0.01, "nf4": 0.12}
"""Relative error of the product of a random matrix of that kind; int8 rounds to 1 / 254 of the largest number."""


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    for library in ("torchao", "bitsandbytes"):
        pytest.importorskip(library, reason="needs pip install 'netllm-pl[quantize]'")


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_inner": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "t5": {"d_model": 64, "d_kv": 32, "d_ff": 128},
    "llava": {"text_config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 64,
                              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}},
}  # fmt: skip
"""Layers of whole blocks of NF4."""


def tiny(architecture: str = "llama", **changes: Any) -> BackboneConfig:
    config = SIZES.get(architecture, {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}) | changes.pop(
        "config", {}
    )
    return tiny_backbone(architecture, config=config, **changes)


def backbone(architecture: str = "llama", **changes: Any) -> Backbone:
    return Backbone(tiny(architecture, **changes)).eval()


def tokens(d_model: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 7, d_model, generator=torch.Generator().manual_seed(seed))


def layers(module: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers of the language model itself."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and "lora" not in name}


def error(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


# The layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2", "llava", "t5"])
def test_every_linear_layer_is_quantised_and_multiplies_nearly_as_before(architecture: str, bits: Any) -> None:
    plain = backbone(architecture, lora=None)
    model = backbone(architecture, lora=None, quantize=bits)
    found, before = layers(model), layers(plain)
    kept = {name for name, layer in found.items() if layer.weight.numel() * 4 == weight_bytes(layer.weight)}
    assert all(name.endswith(".wo") for name in kept) and len(kept) == (2 if architecture == "t5" else 0)
    # GPT-2 has layers of its own kind; here all are linear ones.
    assert len(found) == (8 if architecture == "gpt2" else len(before))
    for name in found.keys() - kept:
        old = plain.get_submodule(name)
        x = torch.randn(50, found[name].in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            bias = 0 if old.bias is None else old.bias
            assert error(found[name](x) - bias, old(x) - bias) < ERROR[bits]
    x = tokens(model.d_model)
    with torch.no_grad():
        assert 0 < error(model(x), plain(x)) < (0.02 if bits == "int8" else 0.35)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", BITS)
def test_answers_are_close_in_every_type(bits: Any, dtype: Any) -> None:
    plain, model = backbone(dtype=dtype), backbone(dtype=dtype, quantize=bits)
    x = tokens(model.d_model)
    with torch.no_grad():
        assert model(x).dtype == torch.float32 and error(model(x), plain(x)) < 0.03
    lora = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert lora == {torch.float32}


@pytest.mark.parametrize(("bits", "share"), [("int8", 0.26), ("nf4", 0.15)])
def test_the_weights_take_less_memory(bits: Any, share: float) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    plain, model = backbone(lora=None, config=sizes), backbone(lora=None, config=sizes, quantize=bits)
    own, before = ([p for _, p in sorted(m.named_parameters())] for m in (model, plain))
    assert sum(map(weight_bytes, before)) == sum(p.numel() * 4 for p in before)
    assert sum(map(weight_bytes, own)) < share * sum(map(weight_bytes, before))
    # What the storages hold, in case a part shows a piece of something larger.
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for p in own for part in parts_of(p)}
    assert sum(storages.values()) < share * sum(map(weight_bytes, before))
    assert [weight_count(p) for p in own] == [p.numel() for p in before]


def test_the_benchmark_counts_what_weights_stand_for_and_the_bytes_that_they_take() -> None:
    task, quantised = (CandidateTask(tiny(quantize=bits)) for bits in (None, "nf4"))
    assert task.backbone is not None and quantised.backbone is not None
    assert flop_per_token(task.backbone) == flop_per_token(quantised.backbone)
    one, two = describe(task), describe(quantised)
    assert one["backbone_parameters"] == two["backbone_parameters"] and one["backbone_gb"] > 2 * two["backbone_gb"]


# Training and checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compiled", [False, True])
def test_training_keeps_no_floats_as_large_as_weights(bits: Any, compiled: bool) -> None:
    """What autograd keeps, apart from the quantised weights themselves, is smaller than they were as floats."""
    model = backbone(quantize=bits, dtype="bfloat16", config={"hidden_size": 256, "intermediate_size": 512}).train()
    if compiled:
        torch._dynamo.reset()
        for part in model.modules():
            if isinstance(part, GradientCheckpointingLayer):
                part.compile(backend="aot_eager")
    own = {part.untyped_storage().data_ptr() for weight in model.parameters() for part in parts_of(weight)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages = [part.untyped_storage() for part in parts_of(tensor)]
        kept.update({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in own})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.randn(1, 1, model.d_model, requires_grad=True))
    assert sum(kept.values()) < 2 * 256 * 512, "one weight in bfloat16"
    hidden.sum().backward()


def test_gradients_through_int8_are_those_of_the_floats_that_it_stands_for() -> None:
    layer = next(iter(layers(backbone(quantize="int8")).values()))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    weight = layer.weight.dequantize()
    (expected,) = torch.autograd.grad((x @ weight.T).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_reach_lora_and_the_tokens_and_nothing_else(bits: Any, checkpointing: bool) -> None:
    model = backbone(quantize=bits, checkpointing=checkpointing)
    x = tokens(model.d_model)
    with torch.no_grad():
        model(x)  # a validation before training must not change how gradients flow
    x.requires_grad_()
    model.train()(x).square().mean().backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in got) and len(got) == 8


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_tokens_are_those_of_the_weights_that_are_used(bits: Any) -> None:
    model = backbone(quantize=bits, lora=None)
    x = tokens(model.d_model).double().float().requires_grad_()
    direction = tokens(model.d_model, seed=1)
    model(x)[:, -1].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        step = 1e-2
        moved = (model(x + step * direction) - model(x - step * direction))[:, -1].sum() / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), moved, rtol=0.02, atol=1e-3)


def data() -> CandidateData:
    experience = Experience(policies="best", episodes=6, eval_episodes=2, explore=0.5, values="true")
    return CandidateData(experience, batch_size=4)


@pytest.mark.parametrize("bits", BITS)
def test_a_task_on_quantised_weights_keeps_its_contract(bits: Any, own_cache: Path) -> None:
    """It learns, its checkpoint and what is exported hold what learns and give equal answers, others are refused."""
    check_task(CandidateTask, data(), backbone=tiny(quantize=bits), context=3, actions=True)


def test_training_evaluation_and_export_by_command(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = yaml.safe_load((ROOT / "configs" / "llm" / "tiny_random.yaml").read_text())
    (tmp_path / "int8.yaml").write_text(yaml.safe_dump({**tiny, "quantize": "int8"}))
    config = str(ROOT / "configs" / "throughput_prediction.yaml")
    run, small = tmp_path / "run", ["--config", str(ROOT / "configs" / "overlays" / "smoke.yaml")]
    main(["fit", "--config", config, *small, "--model.init_args.backbone", str(tmp_path / "int8.yaml"),
          "--run_dir", str(run)])  # fmt: skip
    main(["export", str(run / "best.ckpt"), "--out", str(tmp_path / "exported")])
    policies = f"{run / 'best.ckpt'},{tmp_path / 'exported'}"
    main(["evaluate", "--config", config, "--policies", policies, "--out", str(tmp_path / "results")])
    capsys.readouterr()
    task = load_task(run / "best.ckpt")
    assert task.backbone is not None and task.backbone.config.quantize == "int8"
    summary = pd.read_csv(tmp_path / "results" / "summary.csv")
    assert len(summary["policy"].unique()) == 2 and summary.groupby("metric")["mean"].nunique().eq(1).all()


def test_adapters_of_quantised_and_other_weights_are_kept_apart(tmp_path: Path, own_cache: Path) -> None:
    configs = {bits: tiny(quantize=bits) for bits in (None, *BITS)}
    task = CandidateTask(configs["nf4"])
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data())
    trainer.save_checkpoint(tmp_path / "nf4.ckpt")
    check_identity(CandidateTask(configs["nf4"]), read_checkpoint(tmp_path / "nf4.ckpt"))
    for bits in (None, "int8"):
        with pytest.raises(UserError, match=r"another backbone .*-nf4.*quantize nf4"):
            check_identity(CandidateTask(configs[bits]), read_checkpoint(tmp_path / "nf4.ckpt"))


@pytest.mark.parametrize("bits", BITS)
def test_cut_and_stored_models_are_quantised_too(bits: Any, tmp_path: Path) -> None:
    whole = backbone(lora=None)
    whole.model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = BackboneConfig(str(tmp_path), dtype="float32", layers=1, lora=None)
    plain, model = Backbone(loaded).eval(), Backbone(replace(loaded, quantize=bits)).eval()
    x = tokens(plain.d_model)
    with torch.no_grad():
        assert 0 < error(model(x), plain(x)) < 0.02
    assert len(layers(model)) == 7 and model.fingerprint == f"{plain.fingerprint}-{bits}"


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_weights_of_a_full_fine_tune_cannot_be_quantised() -> None:
    with pytest.raises(UserError, match="full trains all weights, int8 ones cannot learn"):
        backbone(lora=None, full=True, quantize="int8")


def test_layers_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"nf4 needs layers of 64, 128, \.\.\. inputs, not 32; set int8"):
        backbone(config={"hidden_size": 32}, quantize="nf4")


@pytest.mark.parametrize(("bits", "module"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_extra_is_named(bits: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requires = [
        f"{line}; extra == '{extra}'" for extra, lines in project["optional-dependencies"].items() for line in lines
    ]
    monkeypatch.setattr(errors.metadata, "requires", lambda name: requires)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        backbone(quantize=bits)
    assert errors.explained(caught.value) == (
        f"the module {module} is not installed; pip install 'netllm-pl[quantize]'"
    )


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_it_answers_as_on_the_cpu_and_learns(bits: Any) -> None:
    model = backbone(quantize=bits, config={"hidden_size": 256, "intermediate_size": 512})
    x = tokens(model.d_model)
    with torch.no_grad():
        here = model(x)
        before = torch.cuda.memory_allocated()
        model.to("cuda")
        taken = torch.cuda.memory_allocated() - before
        assert error(model(x.cuda()).cpu(), here) < 0.02
    floats = sum(4 * weight_count(p) for p in model.parameters() if not p.requires_grad)
    assert taken < 0.6 * floats
    y = x.cuda().requires_grad_()
    model.train()(y).square().mean().backward()
    assert y.grad is not None and y.grad.count_nonzero() > 0
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval().to("cpu")(x), here, atol=1e-4, rtol=0)
