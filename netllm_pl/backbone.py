"""The frozen language model that a task is adapted to, with LoRA; `netllm_pl.loading` says where it comes from."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from netllm_pl.attention import go_maskless
from netllm_pl.errors import UserError, at_least
from netllm_pl.graphs import LearningGraph, normal_mode
from netllm_pl.late_weights import Source, Stored, blank, is_put_off, missing
from netllm_pl.loading import ENCODERS, comes_late, load_model, quiet
from netllm_pl.quantize import Bits, quantize
from netllm_pl.random_weights import Draw

LORA_TARGETS: dict[str, list[str]] = {
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "phi3": ["qkv_proj"],
}
"""Attention inputs by architecture; all others name them q_proj and v_proj (Llama, Mistral, Qwen, OPT ...)."""

POSITIONS = ("wpe", "embed_positions")
"""What GPT-2 (and its kin) and OPT call their learned position vectors; other models compute theirs."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of linear layers (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank; null takes the rank.
        dropout: Dropout on the input of the update, in training.
        targets: Names of the layers to adapt, ``all-linear``, or null for the attention inputs of the architecture.
    """

    rank: int = 32
    alpha: int | None = None
    dropout: float = 0.05
    targets: list[str] | Literal["all-linear"] | None = None

    def __post_init__(self) -> None:
        at_least(1, "backbone.lora.", rank=self.rank, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError(f"backbone.lora.dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class BackboneConfig:
    """Which language model to take and how.

    Attributes:
        name: ``smollm2-135m``, ``gemma3-270m``, a local folder, a ``.gguf`` file, a Hugging Face hub id, or an
            architecture (``llama``).
        pretrained: False draws the same architecture with random weights (ablation; needs no download of weights).
        config: Entries that replace those of the architecture's configuration, for random weights.
        layers: Keep only the first k layers; null keeps all.
        dtype: Type of the frozen weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        quantize: Keep the frozen linear layers in ``int8`` or ``nf4`` (4 bits), to save memory; they compute in dtype.
            Needs pip install 'netllm-pl[quantize]'.
        attention: Attention implementation of transformers (sdpa, eager, flash_attention_2); null lets it choose.
        checkpointing: Recompute activations in the backward pass to save memory: of all layers, or of the first ones,
            as a share between 0 and 1. All of them make a step half as long again.
        training_graph: On a GPU, capture forward and backward pass of training in CUDA graphs: for small models, whose
            steps are bound by launching kernels. All batches but those of the first one's shape run without.
        compile: Compile the layers for training and for captured decisions: a first step takes longer, all later ones
            less. Validation and test passes, whose shapes differ, are not compiled.
        graphs: On a GPU, capture decisions and single predictions in CUDA graphs, for tasks whose steps all have the
            same shape. LoRA is merged for them, into copies of the adapted layers.
        lora: Low-rank adapter; null trains the encoder and the head only.
        full: Train all weights instead (for comparison; checkpoints then hold them all).
        seed: Seed of the random weights when not pretrained.
        draw_on: Where random weights are drawn: ``cpu`` as transformers does, in float32; ``anywhere`` on the device
            where they are used, in dtype, each from a hash of its place (`netllm_pl.random_weights`): those of a 7B
            model in seconds, the same ones on all devices and for any number of processes that share them out. Null
            takes ``anywhere`` for a billion weights and more.
    """

    name: str = "smollm2-135m"
    pretrained: bool = True
    config: dict[str, Any] | None = None
    layers: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Bits | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    checkpointing: bool | float = False
    compile: bool = False
    graphs: bool = True
    training_graph: bool = False
    lora: LoRA | None = field(default_factory=LoRA)
    full: bool = False
    seed: int = 0
    draw_on: Literal["cpu", "anywhere"] | None = None

    def torch_dtype(self) -> torch.dtype:
        """Return the type of the frozen weights on this machine."""
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Backbone(nn.Module):
    """A language model that reads token-like vectors and gives its last hidden states.

    The word embedding and the LM head are dropped: a task brings its own encoder and head.

    Args:
        config: Which model and how.

    Attributes:
        d_model: Size of a token vector that goes in.
        d_hidden: Size of a hidden state that comes out (equal to d_model for nearly all models).
        token_scale: Root mean square of what the word embedding gives, the scale that the first layer expects.
        word_scale: What it multiplies its vectors by (Gemma: the root of d_model); 1 for nearly all models.
        places: Length that it can read, if its positions are learned vectors; else None.
        fingerprint: Names the frozen weights; equal for equal weights in float32 and bfloat16, and others if quantised.
        sharded: Whether the processes of a run share out its layers (`netllm_pl.sharded`); then all of them must run it
            equally often.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        if config.full and config.lora is not None:
            raise UserError("backbone: full and lora exclude each other; set lora: null for a full fine-tune")
        if config.full and config.quantize is not None:
            raise UserError(f"backbone: full trains all weights, {config.quantize} ones cannot learn; drop quantize")
        if not 0 <= config.checkpointing <= 1:
            raise UserError(f"backbone.checkpointing is {config.checkpointing}; it is a share of the layers, 0 to 1")
        if config.checkpointing and config.training_graph:
            raise UserError("backbone: training_graph cannot recompute activations; drop it or checkpointing")
        model = load_model(config)
        embedding = model.get_input_embeddings()
        weight: Tensor = embedding.get_parameter("weight").detach()
        self.d_model = int(weight.shape[1])
        self.d_hidden = int(getattr(model.config, "word_embed_proj_dim", None) or model.config.hidden_size)
        draw = Draw(model, config.seed) if weight.is_meta else None
        if config.pretrained:
            weight = weight.to(config.torch_dtype())  # as it is unless it comes in the type of the file
        self.token_scale = float(weight.float().square().mean().sqrt()) if draw is None else draw.std
        self.word_scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.token_scale *= self.word_scale
        self.causal = not model.config.is_encoder_decoder and model.config.model_type not in ENCODERS
        model.set_input_embeddings(nn.Identity())
        self.places = _places(model)
        self.fingerprint = fingerprint_of(model, draw)
        if not config.pretrained and draw is None:
            _cast(model, config.torch_dtype())
        if config.quantize is not None:
            quantize(model, config.quantize, config.torch_dtype(), draw)
            # Answers differ by more than those of float types, so adapters are kept apart.
            self.fingerprint += f"-{config.quantize}"
        self._source: Source | None = None
        if draw is not None and (config.full or not is_put_off()):
            draw.fill(model, "", torch.get_default_device(), config.torch_dtype())
        elif draw is not None:
            self._source = draw
            blank(model, config.torch_dtype())
        elif comes_late(config, model):
            self._source = Stored(model, config.torch_dtype())
        model.requires_grad_(config.full)
        if config.checkpointing:
            checkpoint_activations(model, config.checkpointing)
        self.model: nn.Module = model if config.lora is None else _adapt(model, config.lora)
        if config.compile:
            compile_layers(self.model)
        self._instead: list[nn.Module] = []  # in a list, so that it is no part of this module
        self._graph: LearningGraph | None = None
        self.sharded = False

    def place(self, device: torch.device, layer: nn.Module | None = None) -> None:
        """Give a layer, or all, the frozen weights that were put off (`netllm_pl.late_weights.put_off`), if any were.

        Args:
            device: Where they go.
            layer: One of `layers_of`.
        """
        if self._source is not None:
            get_base_model: Any = getattr(self.model, "get_base_model", None)
            whole: nn.Module = self.model if get_base_model is None else get_base_model()
            path = "" if layer is None else next(name for name, part in whole.named_modules() if part is layer)
            self._source.fill(whole if layer is None else layer, path, device, self.dtype)
            if layer is None:
                self._source = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        return self.config.torch_dtype()

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run the language model once.

        Args:
            tokens: (B, T, d_model) float; the new tokens only when a cache holds earlier ones.
            mask: (B, T) bool, True at real tokens; null if all are. With a cache it covers the cached tokens too. Or
                (B or 1, 1, T, cached + T) bool, which tokens each token sees (causal models only).
            cache: Keys and values of earlier tokens, extended in place (causal models only).
            positions: (B, T) int64 place of each token in its sequence; null counts from the first one.

        Returns:
            (B, T, d_hidden) float32 last hidden states.
        """
        extra: dict[str, Any] = {}
        if self.places is not None:
            self._check_places(tokens.shape[1], cache, positions)
        if self.causal:
            extra = {"use_cache": cache is not None, "past_key_values": cache}
        elif cache is not None:
            raise UserError(f"backbone {self.config.name}: an encoder keeps no key/value cache; take a causal model")
        if positions is not None:
            extra["position_ids"] = positions
        learning = self.training and torch.is_grad_enabled()
        alone = self.causal and cache is None
        graph = alone and learning and self.config.training_graph and tokens.device.type == "cuda"
        model = self._instead[0] if self._instead else self.model
        captured = alone and mask is None and (graph or bool(self._instead))
        values, size = tokens.to(self.dtype), tokens.shape[1]
        maskless = go_maskless(model, alone and mask is None, size)
        if captured and not maskless:
            # transformers takes another way while a graph is captured than before, unless it finds a whole mask.
            mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=tokens.device).tril()
        if captured and positions is None:  # which some models would else count in the mask
            extra["position_ids"] = torch.arange(size, device=tokens.device)[None]
        attention = None if mask is None else mask.long() if mask.dim() == 2 else self._visible(mask, model)
        hidden = None
        if graph and (mask is None or mask.dim() == 4):
            self._graph = self._graph or LearningGraph(self.model)
            hidden = self._graph(values, attention, extra.get("position_ids"))
        if hidden is None:
            # Only training always comes in the same shape; anything else would be compiled again and again.
            plain = self.config.compile and not learning and not self._instead
            # Layers that are put together in inference mode could not be used in training.
            normal = normal_mode() if self.sharded and torch.is_inference_mode_enabled() else nullcontext()
            with torch.compiler.set_stance("force_eager") if plain else nullcontext(), normal:
                hidden = model(inputs_embeds=values, attention_mask=attention, **extra).last_hidden_state
        result: Tensor = hidden.float()
        return result

    @contextmanager
    def replaced(self, model: nn.Module) -> Iterator[None]:
        """Run another model, such as `netllm_pl.frozen.frozen_copy` of this one, for a while."""
        self._instead.append(model)
        try:
            yield
        finally:
            self._instead.pop()

    def _check_places(self, length: int, cache: Cache | None, positions: Tensor | None) -> None:
        """Refuse sequences that are longer than a model with learned positions can read."""
        cached = 0 if cache is None else cache.get_seq_length()
        self.check_last(cached + length - 1 if positions is None else int(positions.max()))

    def check_last(self, last: int) -> None:
        """Refuse a last token that is behind what a model with learned positions can read."""
        if self.places is not None and last >= self.places:
            raise UserError(
                f"backbone {self.config.name} has learned positions for {self.places} tokens, token {last + 1} came;"
                " take shorter sequences or a model with rotary positions such as smollm2-135m"
            )

    def _visible(self, mask: Tensor, model: nn.Module) -> Tensor:
        """Say which tokens each token sees in the way that the attention implementation understands."""
        implementation = getattr(model, "config")._attn_implementation  # noqa: B009  # not declared by nn.Module
        if implementation == "sdpa":
            return mask
        if implementation != "eager":
            raise UserError(f"backbone.attention {implementation} takes no mask of its own; set it to sdpa")
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)


def checkpoint_activations(model: Any, share: float = 1.0) -> None:
    """Let a model of transformers recompute activations in the backward pass.

    Args:
        model: The language model.
        share: Of the layers. The first ones, whose activations would be kept for longest.
    """
    # The name before transformers 5.20; from then on it is a deprecated alias.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers[math.ceil(share * len(layers)) :]:
        layer.gradient_checkpointing = False


def compile_layers(model: nn.Module, dynamic: bool | None = None) -> None:
    """Compile each layer on its own: all are alike, so that one compilation serves all of them.

    Args:
        model: The language model.
        dynamic: Whether sizes of inputs may change; None takes them as fixed until they do.
    """
    # Of several processes each would cut its graphs where gradients are sent off: with one graph a layer that is done.
    torch._dynamo.config.optimize_ddp = False
    for layer in layers_of(model):
        layer.compile(dynamic=dynamic)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a language model of transformers."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def backbones_of(task: nn.Module) -> list[Backbone]:
    """All language models in a task."""
    return [module for module in task.modules() if isinstance(module, Backbone)]


def placed(task: nn.Module, device: torch.device | str) -> None:
    """Give all language models in a task the frozen weights that were put off, if any were; shared ones stay shared."""
    given: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # both are kept, so that no id is used again
    for backbone in backbones_of(task):
        late = [(module, *named) for module in backbone.model.modules() for named in missing(module).items()]
        for module, name, weight in late:
            if id(weight) in given:
                setattr(module, name, given[id(weight)][1])
        backbone.place(torch.device(device))
        given |= {id(weight): (weight, module.get_parameter(name)) for module, name, weight in late}


def is_sharded(task: nn.Module) -> bool:
    """Whether all processes of the run must take part in each pass of a task, as each has a share of the weights."""
    return any(backbone.sharded for backbone in backbones_of(task))


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights, but no buffers: rotary frequencies stay float32, as they do when weights are loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _adapt(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = lora.targets or LORA_TARGETS.get(model.config.model_type, ["q_proj", "v_proj"])
    alpha = lora.rank if lora.alpha is None else lora.alpha
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with quiet():  # PEFT corrects fan_in_fan_out for GPT-2 itself, and asks transformers by an old name
            adapted: nn.Module = get_peft_model(model, settings)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"backbone.lora.targets {targets} fit no layer; there are: {', '.join(names)}") from error
    return adapted


def _places(model: nn.Module) -> int | None:
    """Return how many positions a model has learned vectors for; None if it computes them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in POSITIONS:
            return module.num_embeddings - int(getattr(module, "offset", 0))  # OPT's first two are not used
    return None


def fingerprint_of(model: nn.Module, draw: Draw | None = None) -> str:
    """Hash the architecture and up to 1024 evenly spaced values of every weight, as bfloat16.

    Args:
        model: The model.
        draw: Where weights that are not drawn yet come from; of vectors, which it does not draw, only shapes count.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.named_parameters()):
        step = max(1, weight.numel() // 1024)
        if draw is None:
            sample = weight.detach().flatten()[::step][:1024].to(torch.bfloat16)
        else:
            places = torch.arange(0, weight.numel(), step)[:1024]
            sample = (draw.numbers(name, places) if weight.dim() > 1 else places * 0).to(torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
