"""Llama's layers on a CPU for a few tokens at a time, where a pass takes as long as reading the weights.

Matrix libraries are made for many tokens: for two of them they take several times as long. And frozen weights that were
published in bfloat16 are kept as such, half as long to read, and widened on the way: no number differs from float32's.
One thread does it all: it reads nearly as fast as several, and does not wait for others on a machine that is shared.

Shapes: N episodes side by side, Q new tokens of each, M = N Q, T places of keys and values, D numbers of a head.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from netllm_pl.backbone import Backbone
from netllm_pl.frozen import inner_model, merged_of
from netllm_pl.kernels import njit

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[Any]
"""float32, or bfloat16 as uint16."""

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
            _layer(rows, *same, *layer)
        _normalise(rows, _floats(self.norm.weight), self.epsilon, rows)
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


# Kernels --------------------------------------------------------------------------------------------------------------

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order: else they would not be vectorised."""


def _widening(context: Any, number: Any) -> Any:
    """Turn bfloat16, as uint16, into float32; float32 stays."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if number == types.float32:
            return value
        bits = builder.zext(value, context.get_value_type(types.uint32))
        bits = builder.shl(bits, context.get_constant(types.uint32, 16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(number), generate


_widen: Any = intrinsic(_widening)


@njit(fastmath=FAST, error_model="numpy")
def _linear(rows: Floats, layer: tuple[Weights, Floats], out: Floats) -> None:
    """Multiply rows (M, K) by a weight (J, K) and add a bias (J,), unless that is empty."""
    weight, bias = layer
    count, zero = len(rows), np.float32(0)
    for j in range(len(weight)):
        start = bias[j] if len(bias) else zero
        line = weight[j]
        m = 0
        while m + 4 <= count:
            first, second, third, fourth = rows[m], rows[m + 1], rows[m + 2], rows[m + 3]
            a, b, c, d = zero, zero, zero, zero
            for k in range(len(line)):
                w = _widen(line[k])
                a += w * first[k]
                b += w * second[k]
                c += w * third[k]
                d += w * fourth[k]
            out[m, j], out[m + 1, j], out[m + 2, j], out[m + 3, j] = start + a, start + b, start + c, start + d
            m += 4
        while m + 2 <= count:
            first, second = rows[m], rows[m + 1]
            a, b = zero, zero
            for k in range(len(line)):
                w = _widen(line[k])
                a += w * first[k]
                b += w * second[k]
            out[m, j], out[m + 1, j] = start + a, start + b
            m += 2
        if m < count:
            first = rows[m]
            a = zero
            for k in range(len(line)):
                a += _widen(line[k]) * first[k]
            out[m, j] = start + a


@njit(fastmath=FAST, error_model="numpy")
def _normalise(rows: Floats, weight: Floats, epsilon: np.float32, out: Floats) -> None:
    """Divide rows by their root mean square."""
    size = rows.shape[1]
    for m in range(len(rows)):
        total = np.float32(0)
        for k in range(size):
            total += rows[m, k] * rows[m, k]
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
        for k in range(size):
            out[m, k] = rows[m, k] * factor * weight[k]


@njit(fastmath=FAST, error_model="numpy")
def _turn(rows: Floats, cos: Floats, sin: Floats) -> None:
    """Turn the heads of rows (M, heads D) by their positions' angles (M, D), in place."""
    width = cos.shape[1]
    half = width // 2
    for m in range(len(rows)):
        for begin in range(0, rows.shape[1], width):
            for k in range(half):
                x, y = rows[m, begin + k], rows[m, begin + half + k]
                rows[m, begin + k] = x * cos[m, k] - y * sin[m, k]
                rows[m, begin + half + k] = y * cos[m, half + k] + x * sin[m, half + k]


@njit(fastmath=FAST, error_model="numpy")
def _attend(
    query: Floats, keys: Floats, values: Floats, mask: npt.NDArray[np.bool_], heads: int, scale: np.float32, out: Floats
) -> None:
    """Attend with queries (M, heads D) to all places that the mask shows."""
    episodes, groups, size, width = keys.shape
    new = mask.shape[1]
    scores = np.empty(size, np.float32)
    out[:] = 0
    for n in range(episodes):
        for q in range(new):
            row = n * new + q
            for head in range(heads):
                group, begin = head * groups // heads, head * width
                most = np.float32(-np.inf)
                for t in range(size):
                    if mask[n, q, t]:
                        total = np.float32(0)
                        for k in range(width):
                            total += query[row, begin + k] * keys[n, group, t, k]
                        scores[t] = total * scale
                        most = max(most, scores[t])
                total = np.float32(0)
                for t in range(size):
                    if mask[n, q, t]:
                        share = np.exp(scores[t] - most)
                        total += share
                        for k in range(width):
                            out[row, begin + k] += share * values[n, group, t, k]
                for k in range(width):
                    out[row, begin + k] /= total


@njit(fastmath=FAST, error_model="numpy")
def _layer(
    rows: Floats, cos: Floats, sin: Floats, mask: npt.NDArray[np.bool_], slots: npt.NDArray[np.int64],
    heads: int, scale: np.float32, epsilon: np.float32, keys: Floats, values: Floats, norm: Floats, second_norm: Floats,
    q: Any, k: Any, v: Any, o: Any, gate: Any, up: Any, down: Any,
) -> None:  # fmt: skip
    """Run a layer over rows (M, d_model), in place."""
    count, size = rows.shape
    normal = np.empty((count, size), np.float32)
    _normalise(rows, norm, epsilon, normal)
    query, key, value = (
        np.empty((count, len(q[0])), np.float32),
        np.empty((count, len(k[0])), np.float32),
        np.empty((count, len(v[0])), np.float32),
    )
    _linear(normal, q, query)
    _linear(normal, k, key)
    _linear(normal, v, value)
    _turn(query, cos, sin)
    _turn(key, cos, sin)
    new, width = len(slots), cos.shape[1]
    for m in range(count):
        for group in range(keys.shape[1]):
            part = slice(group * width, (group + 1) * width)
            keys[m // new, group, slots[m % new]] = key[m, part]
            values[m // new, group, slots[m % new]] = value[m, part]
    attended = np.empty_like(query)
    _attend(query, keys, values, mask, heads, scale, attended)
    _linear(attended, o, normal)
    rows += normal
    _normalise(rows, second_norm, epsilon, normal)
    inner, other = np.empty((count, len(gate[0])), np.float32), np.empty((count, len(gate[0])), np.float32)
    _linear(normal, gate, inner)
    _linear(normal, up, other)
    one = np.float32(1)
    for m in range(count):
        for j in range(inner.shape[1]):
            inner[m, j] *= other[m, j] / (one + np.exp(-inner[m, j]))
    _linear(inner, down, normal)
    rows += normal
