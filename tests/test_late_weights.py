"""Frozen weights that are drawn or read where they are used: the same ones as if they had been there at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from netllm_pl import loading
from netllm_pl.backbone import Backbone, BackboneConfig, LoRA, layers_of, placed
from netllm_pl.checkpoint import KEY, identity, load_task, trained_names
from netllm_pl.export import export
from netllm_pl.frozen import inner_model
from netllm_pl.late_weights import is_missing, put_off
from netllm_pl.random_weights import CHUNK, Draw
from tasks.viewport_prediction import ViewportPrediction

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 64},
    "opt": {
        "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
        "word_embed_proj_dim": 64,
    },
    "gemma2": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 32,
    },
    "t5": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 64},
}  # fmt: skip


GOLDEN = [-0.01109603513032198, 0.020568260923027992, 0.028551993891596794, -0.028687311336398125]


def config(name: str = "llama", **changes: Any) -> BackboneConfig:
    settings = {"dtype": "float32", "lora": LoRA(rank=4, dropout=0.0), "draw_on": "anywhere", "config": SHAPES[name]}
    return BackboneConfig(name, pretrained=False, **(settings | changes))


def at_once(settings: BackboneConfig) -> Backbone:
    torch.manual_seed(0)
    return Backbone(settings).eval()


def late(settings: BackboneConfig, by_layer: bool = True) -> Backbone:
    torch.manual_seed(0)
    with put_off():
        backbone = Backbone(settings).eval()
    assert any(is_missing(weight) for weight in backbone.parameters())
    if by_layer:
        for layer in reversed(layers_of(backbone.model)):
            backbone.place(CPU, layer)
    placed(backbone, CPU)
    return backbone


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def prompt(backbone: Backbone) -> Tensor:
    return torch.randn(2, 5, backbone.d_model, generator=torch.Generator().manual_seed(1)) * backbone.token_scale


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("lora", [LoRA(rank=4), None])
def test_what_is_drawn_late_is_what_is_drawn_at_once(name: str, lora: LoRA | None) -> None:
    """Of all architectures, whole or a layer at a time, in any order, and whatever was drawn from torch before."""
    whole, parts, together = (make(config(name, lora=lora)) for make in (at_once, late, lambda c: late(c, False)))
    assert equal(whole, parts) and equal(whole, together)
    assert whole.fingerprint == parts.fingerprint
    other = at_once(config(name, lora=lora, seed=1))
    assert other.fingerprint != whole.fingerprint
    with torch.no_grad():
        answer = whole(prompt(whole))
        assert torch.equal(answer, parts(prompt(whole))) and answer.isfinite().all()
        assert not torch.allclose(answer, other(prompt(whole)), atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_drawn_weights_are_like_those_of_transformers(name: str) -> None:
    """Of the same names, shapes, types and spread; vectors, such as those of norms, are the same."""
    drawn, usual = (inner_model(at_once(config(name, draw_on=where, lora=None))) for where in ("anywhere", "cpu"))
    for (one, x), (other, y) in zip(drawn.named_parameters(), usual.named_parameters(), strict=True):
        assert one == other and x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x, y) if x.dim() < 2 else name in ("t5", "gpt2") or 0.9 < x.std() / y.std() < 1.1, one
    assert all(torch.equal(x, y) for x, y in zip(drawn.buffers(), usual.buffers(), strict=True))


def test_a_number_depends_on_its_place_alone() -> None:
    """So shards can be drawn apart, on any device and in any type, and a fingerprint needs no model."""
    draw = Draw(inner_model(at_once(config(lora=None))), seed=3)
    weight = torch.empty(CHUNK // 1000 + 1, 1000)  # more than are drawn at once
    draw.matrix("x", weight)
    places = torch.tensor([0, 1, 999, CHUNK - 1, CHUNK, weight.numel() - 1])
    assert torch.equal(draw.numbers("x", places), weight.flatten()[places])
    half = torch.empty_like(weight, dtype=torch.bfloat16)
    draw.matrix("x", half)
    assert torch.equal(half, weight.bfloat16())
    # Golden: other numbers would be other weights under an adapter that was trained.
    assert draw.numbers("x", torch.arange(4)).tolist() == pytest.approx(GOLDEN, rel=1e-6)


def test_drawn_numbers_are_nearly_normal() -> None:
    """Mean 0, the wanted spread, few outliers, and nothing to see between neighbours, weights or seeds."""
    model = inner_model(at_once(config(lora=None)))
    many = torch.arange(2**20)
    one, two, three = (Draw(model, seed).numbers(name, many) for seed, name in ((0, "a"), (0, "b"), (1, "a")))
    assert one.mean().abs() < 1e-4 and one.std() == pytest.approx(0.02, rel=0.01)
    assert 0.66 < (one.abs() < 0.02).float().mean() < 0.70 and 0.94 < (one.abs() < 0.04).float().mean() < 0.97
    for pair in ((one[1:], one[:-1]), (one, two), (one, three), (one[2048:], one[:-2048])):
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs() < 0.005


def test_large_models_are_drawn_like_this_and_small_ones_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is said otherwise."""
    count = sum(weight.numel() for weight in inner_model(at_once(config(lora=None))).parameters()) + 64 * 64
    found = {where: at_once(config(draw_on=where)).fingerprint for where in (None, "cpu", "anywhere")}
    assert found[None] == found["cpu"] != found["anywhere"]
    monkeypatch.setattr(loading, "LARGE", count)
    assert at_once(config(draw_on=None)).fingerprint == found["anywhere"]
    monkeypatch.setattr(loading, "LARGE", count + 1)
    assert at_once(config(draw_on=None)).fingerprint == found["cpu"]


def test_the_fingerprint_of_weights_to_come_knows_their_type_no_more_than_others() -> None:
    """Equal in float32 and bfloat16, as that of weights that are there."""
    assert at_once(config()).fingerprint == at_once(config(dtype="bfloat16")).fingerprint


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_layers_are_quantised_as_they_are_drawn(bits: str) -> None:
    """So that a model never needs more than its quantised weights and one layer; with the answers of drawn ones."""
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[bits])
    backbone, plain = at_once(config(quantize=bits)), at_once(config())
    assert backbone.fingerprint == f"{plain.fingerprint}-{bits}"
    with torch.no_grad():
        answer, exact = backbone(prompt(plain)), plain(prompt(plain))
    assert torch.corrcoef(torch.stack([answer.flatten(), exact.flatten()]))[0, 1] > 0.98


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in float16, as that of Llama 2 lies on the hub."""
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("llama", **SHAPES["llama"])).half().save_pretrained(place)
    return place


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("lora", [LoRA(rank=4), None])
def test_what_is_read_late_is_what_is_read_at_once(folder: Path, dtype: str, lora: LoRA | None) -> None:
    """In the type of the file or another; cut layers too."""
    for layers in (None, 1):
        settings = BackboneConfig(str(folder), layers=layers, dtype=dtype, lora=lora)  # type: ignore[arg-type]
        whole, parts = at_once(settings), late(settings)
        assert equal(whole, parts) and whole.fingerprint == parts.fingerprint and whole.token_scale == parts.token_scale


@pytest.mark.parametrize("settings", [{"quantize": "int8"}, {"full": True, "lora": None}])
def test_weights_that_cannot_come_late_are_there_at_once(folder: Path, settings: dict[str, Any]) -> None:
    """Those that are quantised before LoRA is laid on them, and those that learn, which checkpoints hold."""
    if "quantize" in settings:
        pytest.importorskip("torchao")
    with put_off():
        found = [Backbone(BackboneConfig(str(folder), dtype="float32", **settings))]
        found += [Backbone(config(**settings))] if "full" in settings else []
    assert not any(is_missing(weight) for backbone in found for weight in backbone.parameters())


def test_a_model_whose_parts_stay_in_float32_is_read_at_once(tmp_path: Path) -> None:
    """T5 computes the last part of a block so; which type a weight is to have is not known before."""
    AutoModel.from_config(AutoConfig.for_model("t5", **SHAPES["t5"])).save_pretrained(tmp_path)
    settings = BackboneConfig(str(tmp_path), dtype="float16", lora=None)
    with put_off():
        backbone = Backbone(settings)
    assert not any(is_missing(weight) for weight in backbone.parameters())
    assert equal(backbone, Backbone(settings))
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float16, torch.float32}


def test_checkpoints_and_folders_load_with_weights_that_come_late(tmp_path: Path) -> None:
    """`load_task` puts them off, and places them."""
    task = ViewportPrediction(config()).eval()
    with torch.no_grad():
        for name, weight in task.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    learned = {name: value for name, value in task.state_dict().items() if name in trained_names(task)}
    torch.save({KEY: identity(task), "state_dict": learned}, tmp_path / "x.ckpt")
    batch = {"history": torch.linspace(-40, 40, 60).reshape(2, 10, 3)}
    for path in (tmp_path / "x.ckpt", export(tmp_path / "x.ckpt", tmp_path / "out")):
        loaded = load_task(path)
        assert not any(is_missing(weight) for weight in loaded.parameters())
        with torch.no_grad():
            assert torch.equal(loaded(batch), task(batch))
