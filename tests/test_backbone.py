"""The backbone against the original Hugging Face models, with tiny random weights of every architecture.

Shapes: B batch, T tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from netllm_pl.backbone import Backbone, BackboneConfig, LoRA
from netllm_pl.errors import UserError
from netllm_pl.testing import tiny_backbone

# SmolLM2: a Llama with tied word embedding and LM head, and three query heads to one of keys and values.
SMOLLM = {"tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "t5", "llava")},
    "smollm": ("llama", SMOLLM),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
}
CAUSAL = [name for name in CASES if name != "t5"]
FACTORY: dict[str, Any] = {"t5": T5ForConditionalGeneration, "llava": LlavaForConditionalGeneration}


def tiny(case: str, **changes: Any) -> BackboneConfig:
    architecture, sizes = CASES[case]
    return tiny_backbone(architecture, config=sizes, **changes)


def original(case: str) -> PreTrainedModel:
    """The model as its authors publish it: with word embedding and LM head."""
    config = tiny(case)
    hf = AutoConfig.for_model(config.name, **(config.config or {}))
    torch.manual_seed(3)
    factory = FACTORY.get(case, AutoModelForCausalLM)
    model: PreTrainedModel = factory(hf) if case in FACTORY else factory.from_config(hf)
    return model.eval()


def reader(case: str, model: PreTrainedModel) -> Any:
    """The part of the original that reads token vectors."""
    if case == "t5":
        return model.encoder
    return model.model.language_model if case == "llava" else model.base_model


def tokens(d_model: int, batch: int = 2, length: int = 7) -> Tensor:
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PreTrainedModel, BackboneConfig]:
    """A case, the original, and the configuration of a backbone that loads it from a folder."""
    model = original(request.param)
    model.save_pretrained(tmp_path / "model")
    return request.param, model, BackboneConfig(str(tmp_path / "model"), dtype="float32", lora=None)


def test_hidden_states_equal_those_of_the_original(saved: tuple[str, PreTrainedModel, BackboneConfig]) -> None:
    case, model, config = saved
    backbone = Backbone(config).eval()
    x = tokens(backbone.d_model)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    with torch.no_grad():
        for given in (None, mask):
            expected = reader(case, model)(inputs_embeds=x, attention_mask=given).last_hidden_state
            keep = mask if given is not None else torch.ones_like(mask)
            torch.testing.assert_close(backbone(x, given)[keep], expected[keep], atol=1e-5, rtol=0)
    assert expected.shape[-1] == backbone.d_hidden
    words = model.get_input_embeddings()(torch.arange(64)).detach()
    assert backbone.token_scale == pytest.approx(words.square().mean().sqrt().item())


def test_the_first_layers_are_those_of_the_original(saved: tuple[str, PreTrainedModel, BackboneConfig]) -> None:
    case, model, config = saved
    backbone = Backbone(replace(config, layers=1)).eval()
    part = reader(case, model)
    x = tokens(backbone.d_model)
    norms = [getattr(part, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(part, name)]
    norm = norms[0] if norms else part.decoder.final_layer_norm
    with torch.no_grad():
        states = part(inputs_embeds=x, output_hidden_states=True).hidden_states
        torch.testing.assert_close(backbone(x), norm(states[1]), atol=1e-5, rtol=0)
    assert count(backbone) < count(Backbone(config))


def test_word_embedding_and_lm_head_are_not_kept(saved: tuple[str, PreTrainedModel, BackboneConfig]) -> None:
    case, model, config = saved
    embedding = model.get_input_embeddings().weight.numel()
    backbone = Backbone(config)
    assert count(backbone) == count(reader(case, model)) - embedding
    assert not any("embed_tokens" in name or "lm_head" in name for name in backbone.state_dict())
    assert not any(p.requires_grad for p in backbone.parameters())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("case", CASES)
def test_an_architecture_gives_random_weights_by_seed(case: str) -> None:
    backbone, again, other = (Backbone(tiny(case, lora=None, seed=seed)).eval() for seed in (1, 1, 2))
    x = tokens(backbone.d_model)
    with torch.no_grad():
        assert torch.equal(backbone(x), again(x))
        assert not torch.allclose(backbone(x), other(x), atol=1e-3)
    assert backbone.fingerprint == again.fingerprint != other.fingerprint


def test_random_weights_do_not_touch_the_random_state() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Backbone(tiny("llama", lora=None))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_can_be_drawn_anew(tmp_path: Path) -> None:
    original("llama").save_pretrained(tmp_path)
    loaded = Backbone(BackboneConfig(str(tmp_path), dtype="float32", lora=None))
    drawn = Backbone(BackboneConfig(str(tmp_path), pretrained=False, dtype="float32", lora=None))
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in drawn.parameters()]
    assert loaded.fingerprint != drawn.fingerprint


@pytest.mark.parametrize("case", CASES)
def test_lora_starts_as_the_frozen_model_and_learns_alone(case: str) -> None:
    torch.manual_seed(0)
    plain, adapted = (Backbone(tiny(case, lora=lora)) for lora in (None, LoRA(rank=2)))
    x = tokens(plain.d_model)
    torch.testing.assert_close(adapted.eval()(x), plain.eval()(x))
    assert adapted.fingerprint == plain.fingerprint
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert {p.shape[0] for name, p in trainable.items() if "lora_A" in name} == {2}
    adapted(x).square().mean().backward()
    assert all(p.grad is not None for p in trainable.values())
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


def test_lora_targets_and_scale() -> None:
    def layers(targets: Any) -> set[str]:
        names = Backbone(tiny("llama", lora=LoRA(rank=2, targets=targets))).state_dict()
        return {name.split(".")[-4] for name in names if "lora_A" in name}

    assert layers(None) == {"q_proj", "v_proj"}
    assert layers(["o_proj"]) == {"o_proj"}
    assert layers("all-linear") == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for alpha, scale in ((None, 1.0), (8.0, 2.0)):
        model = Backbone(tiny("llama", lora=LoRA(rank=4, alpha=alpha))).model
        assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {scale}


def test_lora_dropout_is_active_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = Backbone(tiny("llama", lora=LoRA(rank=4, dropout=0.5)))
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = tokens(backbone.d_model)
    assert torch.equal(backbone.eval()(x), backbone(x))
    assert not torch.equal(backbone.train()(x), backbone(x))


def test_a_full_fine_tune_trains_every_weight() -> None:
    backbone = Backbone(tiny("llama", lora=None, full=True))
    backbone(tokens(backbone.d_model)).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_take_the_dtype_and_answers_are_float32(dtype: Any) -> None:
    backbone, full = Backbone(tiny("llama", dtype=dtype)).eval(), Backbone(tiny("llama")).eval()
    kinds = {("lora_" in name): p.dtype for name, p in backbone.named_parameters()}
    assert kinds == {False: getattr(torch, dtype), True: torch.float32}
    x = tokens(backbone.d_model)
    hidden = backbone(x)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, full(x), atol=0.1, rtol=0)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_positions_keep_their_precision_in_bfloat16(case: str, tmp_path: Path) -> None:
    """Rotary frequencies in bfloat16 would misplace tokens; loading keeps them, so drawing must too."""
    original(case).save_pretrained(tmp_path)
    for config in (tiny(case, dtype="bfloat16"), BackboneConfig(str(tmp_path), dtype="bfloat16")):
        frequencies = [b for name, b in Backbone(config).named_buffers() if "inv_freq" in name]
        assert frequencies and all(b.dtype == torch.float32 for b in frequencies)


def checkpointed(backbone: Backbone) -> list[nn.Module]:
    return [layer for layer in backbone.modules() if isinstance(layer, GradientCheckpointingLayer)]


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5"])
def test_checkpointing_gives_equal_gradients(case: str) -> None:
    gradients = []
    for checkpointing in (False, 0.5, True):
        torch.manual_seed(0)
        backbone = Backbone(tiny(case, lora=LoRA(rank=2, dropout=0.0), checkpointing=checkpointing))
        recomputed = [bool(getattr(layer, "gradient_checkpointing")) for layer in checkpointed(backbone)]  # noqa: B009
        assert recomputed == {False: [False, False], 0.5: [True, False], True: [True, True]}[checkpointing]
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        x = tokens(backbone.d_model).requires_grad_()
        torch.manual_seed(1)  # GPT-2 and T5 have dropout of their own
        backbone.train()(x).square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in backbone.parameters() if p.requires_grad)])
    for plain, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other)


@pytest.mark.parametrize("case", CAUSAL)
def test_cached_tokens_give_the_same_as_one_pass(case: str) -> None:
    backbone = Backbone(tiny(case)).eval()
    x = tokens(backbone.d_model, length=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 0] = False
    with torch.no_grad():
        for given in (None, mask):
            cache = DynamicCache()
            parts = []
            for start, stop in ((0, 5), (5, 6), (6, 9)):
                parts.append(backbone(x[:, start:stop], None if given is None else given[:, :stop], cache))
            keep = torch.ones_like(mask) if given is None else mask
            torch.testing.assert_close(torch.cat(parts, 1)[keep], backbone(x, given)[keep], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CAUSAL)
def test_causal_models_do_not_see_later_tokens(case: str) -> None:
    backbone = Backbone(tiny(case)).eval()
    assert backbone.causal
    x = tokens(backbone.d_model)
    later = torch.cat([x[:, :4], -x[:, 4:]], dim=1)
    torch.testing.assert_close(backbone(later)[:, :4], backbone(x)[:, :4])


def test_an_encoder_sees_all_tokens_and_keeps_no_cache() -> None:
    backbone = Backbone(tiny("t5")).eval()
    assert not backbone.causal
    x = tokens(backbone.d_model)
    assert not torch.allclose(backbone(torch.cat([x[:, :4], -x[:, 4:]], dim=1))[:, :4], backbone(x)[:, :4])
    with pytest.raises(UserError, match="no key/value cache"):
        backbone(x, None, DynamicCache())


@pytest.mark.parametrize("case", CASES)
def test_the_fingerprint_names_weights_and_depth_not_dtype(case: str, tmp_path: Path) -> None:
    original(case).bfloat16().save_pretrained(tmp_path)  # as published weights are stored
    same = {Backbone(BackboneConfig(str(tmp_path), dtype=dtype)).fingerprint for dtype in ("float32", "bfloat16")}
    same.add(Backbone(BackboneConfig(str(tmp_path), dtype="float32", lora=LoRA(rank=2))).fingerprint)
    assert len(same) == 1
    drawn = {Backbone(tiny(case, dtype=dtype, seed=4)).fingerprint for dtype in ("float32", "bfloat16", "float16")}
    assert len(drawn) == 1
    cut = Backbone(BackboneConfig(str(tmp_path), dtype="float32", layers=1)).fingerprint
    assert len(same | drawn | {cut}) == 3


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    model = original("llama")
    prints = []
    for step in range(2):
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += step
        model.save_pretrained(tmp_path / str(step))
        prints.append(Backbone(BackboneConfig(str(tmp_path / str(step)), dtype="float32")).fingerprint)
    assert prints[0] != prints[1]


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """Write a Llama with llama.cpp's names and its order of rotary pairs (halves interleaved)."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    model = original("llama")
    for parameter in model.parameters():  # the conversion keeps bfloat16
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(model, tmp_path / "tiny.gguf")
    backbone = Backbone(BackboneConfig(str(tmp_path / "tiny.gguf"), dtype="float32", lora=None)).eval()
    x = tokens(backbone.d_model)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), model.model(inputs_embeds=x).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (BackboneConfig("nobody/nothing"), "nobody/nothing.*cannot be loaded.*smollm2-135m"),
        (BackboneConfig("smolm2-135m"), "smolm2-135m.*cannot be loaded"),
        (BackboneConfig("./not_there"), "unknown backbone folder './not_there'"),
        (BackboneConfig("not_there.gguf"), "no file not_there.gguf"),
        (BackboneConfig("llama"), "architecture without weights; set pretrained: false"),
        (tiny("llama", layers=3), "layers is 3; llama has 1 to 2"),
        (replace(tiny("llama"), config={"hidden_size": 15}), "does not fit the architecture llama.*multiple"),
        (tiny("t5", layers=0), "layers is 0; t5 has 1 to 2"),
        (tiny("llava", layers=9), "layers is 9; llava has 1 to 2"),
        (tiny("llama", full=True), "full and lora exclude each other"),
        (tiny("llama", checkpointing=2.0), "share of the layers, 0 to 1"),
        (tiny("llama", checkpointing=True, training_graph=True), "cannot recompute activations"),
        (tiny("llama", lora=LoRA(targets=["c_attn"])), "c_attn.*fit no layer.*q_proj"),
        (tiny("gpt2", lora=LoRA(targets=["q_proj"])), "q_proj.*fit no layer.*c_attn"),
        (replace(tiny("llama"), pretrained=True), "pretrained: false"),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
def test_mistakes_are_named(config: BackboneConfig, text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        Backbone(config)
    assert len(str(error.value).splitlines()) <= 2


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        Backbone(BackboneConfig(str(tmp_path)))
