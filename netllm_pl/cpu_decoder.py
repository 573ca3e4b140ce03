"""Llama's layers on a CPU for a few tokens at a time, where a pass takes as long as reading the weights.

Matrix libraries are made for many tokens: for two of them they take several times as long. And frozen weights that were
published in bfloat16 are kept as such, half as long to read, and widened on the way: no number differs from float32's.
They lie one behind the other in memory of large pages, from which they come twice as fast as from small ones. LoRA is
not merged into them, which would make them float32. One thread does it all: it waits for no others on a shared machine.

Shapes: N episodes side by side, Q new tokens of each, M = N Q, T places of keys and values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from netllm_pl.backbone import Backbone
from netllm_pl.cpu_layers import Floats, Weights, normalise, run_layer
from netllm_pl.frozen import inner_model, merged_of

LINEAR = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
"""Linear layers of a layer, in the order in which `run_layer` takes them."""
ARCHITECTURES = ("llama", "mistral", "qwen2")
MOST = 8
"""Rows (M) up to which this is clearly faster than matrix libraries are."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Difference to the model itself, relative to its largest number, above which its layers are taken for other ones; in
bfloat16 the model rounds after every operation."""


class CpuDecoder:
    """The layers of a language model, with keys and values in fixed places as `netllm_pl.streaming.Stream` wants them.

    Args:
        backbone: An architecture of `ARCHITECTURES`, on the CPU. What its adapters learn counts at once; where LoRA is
            merged into weights after all (`merges`), when `netllm_pl.frozen.merged_of` is called.
        episodes: N.
        size: T.
    """

    def __init__(self, backbone: Backbone, episodes: int, size: int) -> None:
        model = inner_model(backbone)
        config = model.config
        parts: dict[str, Any] = {
            f"layers.{number}.{name}": model.get_submodule(f"layers.{number}.{name}")
            for number in range(len(model.layers))
            for name in LINEAR
        }
        self.merges = any(hasattr(part, "base_layer") and not _is_low_rank(part) for part in parts.values())
        merged = merged_of(backbone).weights if self.merges else {}
        _pack([getattr(part, "base_layer", part).weight for part in parts.values()])
        self.heads, self.width = config.num_attention_heads, model.layers[0].self_attn.head_dim
        self.rotary, self.norm = model.rotary_emb, model.norm

        def linear(name: str) -> tuple[Weights, Floats, Floats, Floats, np.float32]:
            part = parts[name]
            layer, update = getattr(part, "base_layer", part), (NO_MATRIX, NO_MATRIX, np.float32(0))
            bias = np.empty(0, np.float32) if layer.bias is None else _floats(layer.bias)
            if name in merged:
                return (_plain(merged[name]), bias, *update)
            if layer is not part:
                (adapter,) = part.active_adapters
                first, second = _floats(part.lora_A[adapter].weight), _floats(part.lora_B[adapter].weight)
                update = first, second, np.float32(part.scaling[adapter])
            return (_plain(_PACKED.get(layer.weight, layer.weight)), bias, *update)

        self.layers: list[tuple[Any, ...]] = []
        places = (episodes, config.num_key_value_heads, size, self.width)
        for number, layer in enumerate(model.layers):
            norms = _floats(layer.input_layernorm.weight), _floats(layer.post_attention_layernorm.weight)
            ring = np.zeros(places, np.float32), np.zeros(places, np.float32)
            self.layers.append((*ring, *norms, *(linear(f"layers.{number}.{name}") for name in LINEAR)))
        self.epsilon = np.float32(config.rms_norm_eps)
        self.scaling = np.float32(model.layers[0].self_attn.scaling)

    def __call__(self, tokens: Tensor, seen: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Run new tokens; write their keys and values to their places.

        Args:
            tokens: (N, Q, d_model).
            seen: (N or 1, 1, Q, T) bool, which places each token sees.
            positions: (N or 1, Q) int64.
            slots: (Q,) int64 place of each.

        Returns:
            (N, Q, d_model) float32 last hidden states.
        """
        hidden = tokens.detach().float().clone(memory_format=torch.contiguous_format)
        rows = hidden.flatten(0, 1).numpy()
        angles = self.rotary(hidden, positions.expand(tokens.shape[:2]))
        cos, sin = (part.float().flatten(0, 1).numpy() for part in angles)
        mask = seen[:, 0].expand(len(tokens), -1, -1).numpy()
        same = cos, sin, mask, slots.numpy(), self.heads, self.scaling, self.epsilon
        for layer in self.layers:
            run_layer(rows, *same, *layer)
        normalise(rows, _floats(self.norm.weight), self.epsilon, rows)
        return hidden


def decoder_of(backbone: Backbone, episodes: int, tokens: int, size: int) -> CpuDecoder | None:
    """Return the layers for N episodes, Q tokens a pass and T places; None if another way is faster, or the only one.

    Whether a model is of the kind that is known here is found out by asking both: settings that change layers are many.
    """
    model = inner_model(backbone)
    fits = (
        next(model.parameters()).device.type == "cpu"
        and episodes * tokens <= MOST
        and model.config.model_type in ARCHITECTURES
        and backbone.config.quantize is None
        and not backbone.config.full
        and backbone.dtype in CLOSE
    )
    if not fits:
        return None
    places = torch.arange(tokens)
    probe = torch.randn(1, tokens, backbone.d_model, generator=torch.Generator().manual_seed(0)) * backbone.token_scale
    seen = (places[:, None] >= torch.arange(size))[None, None]
    expected = backbone(probe, positions=places[None])
    found = CpuDecoder(backbone, 1, size)(probe, seen, places[None], places)
    if float((found - expected).abs().max()) > CLOSE[backbone.dtype] * float(expected.abs().max()):
        return None
    return CpuDecoder(backbone, episodes, size)


# Weights --------------------------------------------------------------------------------------------------------------

_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Copies in bfloat16, one for all models that share a weight."""


NO_MATRIX: Floats = np.empty((0, 0), np.float32)
LINE = 32
"""Numbers of 16 bits in a line of the processor's cache."""


def _pack(weights: Sequence[nn.Parameter]) -> None:
    """Copy frozen float32 weights that bfloat16 holds without loss, one behind the other.

    NumPy asks the system for large pages where an array has 4 MB or more; a copy of each weight alone has fewer.
    """
    new = [weight for weight in weights if weight.dtype == torch.float32 and weight not in _PACKED]
    short = [(weight, weight.detach().bfloat16()) for weight in new]
    short = [(weight, copy) for weight, copy in short if torch.equal(copy.float(), weight.detach())]
    sizes = [-(-copy.numel() // LINE) * LINE for _, copy in short]
    whole = torch.from_numpy(np.empty(sum(sizes), np.int16)).view(torch.bfloat16)
    for (weight, copy), part in zip(short, whole.split(sizes), strict=True):
        place = part[: copy.numel()].view(copy.shape)
        _PACKED[weight] = place.copy_(copy)


def _is_low_rank(layer: Any) -> bool:
    """Whether an adapted layer is its base plus one scaled product of two float32 matrices, smaller than the base."""
    adapters = list(getattr(layer, "active_adapters", ()))
    if type(layer).__name__ != "Linear" or len(adapters) != 1 or adapters[0] not in layer.lora_A or layer.merged:
        return False
    first, second = layer.lora_A[adapters[0]], layer.lora_B[adapters[0]]
    return (
        type(layer.base_layer) is nn.Linear
        and adapters[0] not in layer.lora_variant
        and first.bias is None
        and second.bias is None
        and {first.weight.dtype, second.weight.dtype} == {torch.float32}
        and 4 * (first.weight.numel() + second.weight.numel()) < 2 * layer.base_layer.weight.numel()
    )


def _plain(weight: Tensor) -> Weights:
    """The memory of a weight."""
    weight = weight.detach().contiguous()
    array: Weights = (weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight).numpy()
    return array.view(np.uint16) if weight.dtype == torch.bfloat16 else array


def _floats(weight: Tensor) -> Floats:
    array: Floats = weight.detach().float().numpy()
    return array
