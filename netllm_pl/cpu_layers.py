"""Compiled layers of Llama and its kin for a few tokens: what `netllm_pl.cpu_decoder` runs.

Shapes: N episodes side by side, Q new tokens of each, M = N Q rows, T places of keys and values, D numbers of a head.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from netllm_pl.kernels import njit

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[Any]
"""float32, or bfloat16 as uint16."""

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
def _apply(rows: Floats, layer: tuple[Weights, Floats, Floats, Floats, np.float32], out: Floats) -> None:
    """Apply a linear layer with its low-rank update, unless the matrices of that are empty."""
    weight, bias, first, second, scale = layer
    _linear(rows, (weight, bias), out)
    if len(first):
        none = np.empty(0, np.float32)
        low, update = np.empty((len(rows), len(first)), np.float32), np.empty_like(out)
        _linear(rows, (first, none), low)
        _linear(low, (second, none), update)
        out += scale * update


@njit(fastmath=FAST, error_model="numpy")
def normalise(rows: Floats, weight: Floats, epsilon: np.float32, out: Floats) -> None:
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
def run_layer(
    rows: Floats, cos: Floats, sin: Floats, mask: npt.NDArray[np.bool_], slots: npt.NDArray[np.int64],
    heads: int, scale: np.float32, epsilon: np.float32, keys: Floats, values: Floats, norm: Floats, second_norm: Floats,
    q: Any, k: Any, v: Any, o: Any, gate: Any, up: Any, down: Any,
) -> None:  # fmt: skip
    """Run a layer over rows (M, d_model), in place."""
    count, size = rows.shape
    normal = np.empty((count, size), np.float32)
    normalise(rows, norm, epsilon, normal)
    query, key, value = (
        np.empty((count, len(q[0])), np.float32),
        np.empty((count, len(k[0])), np.float32),
        np.empty((count, len(v[0])), np.float32),
    )
    _apply(normal, q, query)
    _apply(normal, k, key)
    _apply(normal, v, value)
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
    _apply(attended, o, normal)
    rows += normal
    normalise(rows, second_norm, epsilon, normal)
    inner, other = np.empty((count, len(gate[0])), np.float32), np.empty((count, len(gate[0])), np.float32)
    _apply(normal, gate, inner)
    _apply(normal, up, other)
    one = np.float32(1)
    for m in range(count):
        for j in range(inner.shape[1]):
            inner[m, j] *= other[m, j] / (one + np.exp(-inner[m, j]))
    _apply(inner, down, normal)
    rows += normal
