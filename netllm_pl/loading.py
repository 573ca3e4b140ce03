"""Where a language model comes from: a name that `fetch` brings, GGUF file, folder, hub id, or random weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from netllm_pl.errors import UserError, unknown
from netllm_pl.late_weights import is_put_off
from netllm_pl.packaged import MODELS
from netllm_pl.random_weights import LARGE

if TYPE_CHECKING:  # which imports this module
    from netllm_pl.backbone import BackboneConfig

NAMED = tuple(MODELS)
"""Backbones that `fetch` brings; any other name is a folder, a .gguf file, an architecture or a hub id."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    f"meta-llama/Llama-2-{name}-hf": (
        "llama",
        {
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
    )
    for name, hidden, inner, layers, heads, kv_heads in (
        ("7b", 4096, 11008, 32, 32, 32), ("13b", 5120, 13824, 40, 40, 40), ("70b", 8192, 28672, 80, 64, 8),
    )
}  # fmt: skip
"""Architectures of models for which the hub wants a permission; with random weights they need neither."""

ENCODERS = ("t5", "mt5")
"""Encoder-decoders, of which only the encoder is run: it sees all tokens and keeps no cache."""


def load_model(config: "BackboneConfig") -> PreTrainedModel:
    """Load a language model, or draw it at random, without its LM head and with the layers that are kept."""
    source, hf = configuration(config)
    _cut(hf, config)
    factory = AutoModelForTextEncoding if hf.model_type in ENCODERS else AutoModel
    attention = {} if config.attention is None else {"attn_implementation": config.attention}
    try:
        if config.pretrained:
            more: dict[str, Any] = {"config": hf, "trust_remote_code": False, **attention}
            with quiet():  # cut layers and the LM head are "unexpected" weights: wanted here
                # In the type of the file they are not read before they are needed.
                model = factory.from_pretrained(source, dtype="auto" if is_put_off() else config.torch_dtype(), **more)
                if is_put_off() and not comes_late(config, model):
                    model = factory.from_pretrained(source, dtype=config.torch_dtype(), **more)
        else:
            model = _random(factory, hf, config, attention)
    except (OSError, ValueError, ImportError) as error:
        cure = "" if config.attention is None else f"; backbone.attention is {config.attention}, sdpa needs no package"
        raise UserError(f"backbone {config.name}: {_first_line(error).rstrip('.')}{cure}") from error
    inner: PreTrainedModel = getattr(model, "language_model", model)  # LLaVA and the like: the language model only
    return inner


def comes_late(config: "BackboneConfig", model: Any) -> bool:
    """Whether a model's stored weights can come later: frozen ones of one type, that are not quantised before."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    return is_put_off() and config.pretrained and config.quantize is None and not config.full and not kept


def _random(factory: Any, hf: PreTrainedConfig, config: "BackboneConfig", more: dict[str, Any]) -> PreTrainedModel:
    """Draw a model at random, or lay it out on the meta device for `Draw`; buffers are there in any case."""
    more = {**more, "trust_remote_code": False}
    if config.draw_on in (None, "anywhere"):
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = factory.from_config(hf, dtype=config.torch_dtype(), **more)
        if config.draw_on == "anywhere" or sum(weight.numel() for weight in model.parameters()) >= LARGE:
            return model
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(config.seed)
        # In float32 so that the same seed gives the same weights for every dtype; they are cast afterwards.
        model = factory.from_config(hf, dtype=torch.float32, **more)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and PEFT from reporting what is meant to be so."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()


def configuration(config: "BackboneConfig") -> tuple[str, PreTrainedConfig]:
    """Find where the weights lie and read the architecture's configuration."""
    from transformers import CONFIG_MAPPING

    source = source_of(config)
    overrides = dict(config.config or {})
    if source in SHAPES and not config.pretrained:
        source, shape = SHAPES[source]
        overrides = shape | overrides
    if code := sorted({"trust_remote_code", "code_revision", "auto_map"} & overrides.keys()):
        raise UserError(f"backbone.config.{code[0]}: code that comes with a model is never run; remove the entry")
    if overrides and config.pretrained:
        raise UserError("backbone.config changes the architecture: it needs pretrained: false (use layers to cut)")
    if source in CONFIG_MAPPING and not Path(source).is_dir():
        if config.pretrained:
            raise UserError(f"backbone {source} is an architecture without weights; set pretrained: false")
        try:
            return source, AutoConfig.for_model(source, **overrides)
        except Exception as error:  # architectures check in ways of their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"backbone.config does not fit the architecture {source}: {reason}") from error
    try:
        hf = AutoConfig.from_pretrained(source, **overrides, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cure = f"Give {', '.join(NAMED)}, a folder with config.json, a .gguf file or a reachable hub id."
        raise UserError(f"backbone '{config.name}' cannot be loaded: {_first_line(error)} {cure}") from error
    return source, hf


def source_of(config: "BackboneConfig") -> str:
    """Folder, architecture or hub id of a backbone; what has to be fetched or converted is so now."""
    path = Path(config.name).expanduser()
    if config.name in NAMED:
        from netllm_pl.fetch import fetch

        return str(fetch(config.name))
    if path.suffix == ".gguf":
        from netllm_pl.gguf import converted_gguf

        return str(converted_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"backbone {path}: no config.json there; give the folder that save_pretrained wrote")
        return str(path)
    if path.is_absolute() or config.name.startswith("."):
        raise unknown("backbone folder", config.name, NAMED, "Give an existing folder, a .gguf file or a hub id.")
    return config.name


def _cut(hf: PreTrainedConfig, config: "BackboneConfig") -> None:
    """Keep the first layers by asking for fewer: the others are never loaded."""
    if config.layers is None:
        return
    # Of an encoder-decoder transformers gives a copy, and of T5 we run the encoder.
    text = hf if hf.model_type in ENCODERS else hf.get_text_config(decoder=True)
    total = int(text.num_hidden_layers)
    if not 1 <= config.layers <= total:
        raise UserError(f"backbone.layers is {config.layers}; {config.name} has 1 to {total}")
    text.num_hidden_layers = config.layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: config.layers]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
