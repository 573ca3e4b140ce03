"""Llama's layers on a CPU for a few tokens at a time, where a pass takes as long as reading the weights.

Matrix libraries are made for many tokens: for two of them they take several times as long. And frozen weights that were
published in bfloat16 are kept as such, half as long to read, and widened on the way: no number differs from float32's.
One thread does it all: it reads nearly as fast as several, and does not wait for others on a machine that is shared.

Shapes: N episodes side by side, Q new tokens of each, M = N Q, T places of keys and values.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from netllm_pl.backbone import Backbone
from netllm_pl.cpu_layers import Floats, Weights, normalise, run_layer
from netllm_pl.frozen import inner_model, merged_of

ARCHITECTURES = ("llama", "mistral", "qwen2")
MOST = 8
"""Rows (M) up to which this is clearly faster than matrix libraries are."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Difference to the model itself, relative to its largest number, above which its layers are taken for other ones; in
bfloat16 the model rounds after every operation."""


class CpuDecoder:
    """The layers of a language model, with keys and values in fixed places as `netllm_pl.streaming.Stream` wants them.

    Args:
        backbone: An architecture of `ARCHITECTURES`, on the CPU. LoRA is merged into the weights; they follow what it
            learns when `netllm_pl.frozen.merged_of` is called.
        episodes: N.
        size: T.
    """

    def __init__(self, backbone: Backbone, episodes: int, size: int) -> None:
        model, merged = inner_model(backbone), merged_of(backbone)
        config = model.config
        self.heads, self.width = config.num_attention_heads, model.layers[0].self_attn.head_dim
        self.rotary, self.norm = model.rotary_emb, model.norm

        def linear(name: str) -> tuple[Weights, Floats]:
            weight = merged.weights.get(name)
            layer: Any = model.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            bias = np.empty(0, np.float32) if layer.bias is None else _floats(layer.bias)
            return (_packed(layer.weight) if weight is None else _plain(weight)), bias

        self.layers: list[tuple[Any, ...]] = []
        places = (episodes, config.num_key_value_heads, size, self.width)
        for number, layer in enumerate(model.layers):
            norms = _floats(layer.input_layernorm.weight), _floats(layer.post_attention_layernorm.weight)
            attention = [linear(f"layers.{number}.self_attn.{part}_proj") for part in "qkvo"]
            rest = [linear(f"layers.{number}.mlp.{part}_proj") for part in ("gate", "up", "down")]
            ring = np.zeros(places, np.float32), np.zeros(places, np.float32)
            self.layers.append((*ring, *norms, *attention, *rest))
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


def _packed(weight: nn.Parameter) -> Weights:
    """A frozen weight in the fewest bits that hold all of its numbers."""
    if weight.dtype == torch.float32 and weight not in _PACKED:
        short = weight.detach().bfloat16()
        _PACKED[weight] = short if torch.equal(short.float(), weight.detach()) else weight.detach()
    return _plain(_PACKED.get(weight, weight))


def _plain(weight: Tensor) -> Weights:
    """The memory of a weight."""
    weight = weight.detach().contiguous()
    array: Weights = (weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight).numpy()
    return array.view(np.uint16) if weight.dtype == torch.bfloat16 else array


def _floats(weight: Tensor) -> Floats:
    array: Floats = weight.detach().float().numpy()
    return array
