"""Attention for passes that never change their shape, registered among that of transformers.

Shapes: N sequences, H heads, G of them share keys and values, K tokens a pass, T places of keys and values, d size of a
head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL = "netllm_pl_causal"
"""Each token sees all before it: without a mask, which faster kernels do not take, and which shared heads are copied
for."""
RING = "netllm_pl_ring"
"""Keys and values in fixed places, see `netllm_pl.streaming`."""


@contextmanager
def causal(model: Any) -> Iterator[bool]:
    """Let a model of transformers attend without a mask for a while, also while a graph is captured, if it can.

    Yields:
        Whether it does. Else it needs a whole mask: transformers makes another one while a graph is captured than
        before.
    """
    config = model.config
    before = config._attn_implementation
    able = before == "sdpa" and bool(getattr(model, "_supports_attention_backend", False))
    if able:
        config._attn_implementation = CAUSAL
    try:
        yield able
    finally:
        config._attn_implementation = before


def shared_heads(model: Any) -> int:
    """How many heads share keys and values (G); 1 if layers differ in that."""
    found = {int(getattr(part, "num_key_value_groups", 1)) for part in model.modules() if hasattr(part, "layer_idx")}
    return found.pop() if len(found) == 1 else 1


def _causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output: tuple[Tensor, None] = attend(module, query, key, value, None, **{**kwargs, "is_causal": True})
    return output


def _ring(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Write new keys and values to their places, and attend to all places that the mask shows.

    With a mask (1, 1, G K, T) heads that share keys and values are taken for tokens of one head: none are copied.
    """
    if not hasattr(module, "ring_keys"):  # at the first pass, which is not compiled
        shape = (*key.shape[:2], module.ring_size, key.shape[3])
        module.ring_keys, module.ring_values = key.new_zeros(shape), value.new_zeros(shape)
    module.ring_keys.index_copy_(2, module.ring_slots, key)
    module.ring_values.index_copy_(2, module.ring_slots, value)
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    keys, values = module.ring_keys, module.ring_values
    count, heads = query.shape[2], query.shape[1]
    if attention_mask is None or attention_mask.shape[2] == count:
        output: tuple[Tensor, None] = attend(module, query, keys, values, attention_mask, **kwargs)
        return output
    packed = query.reshape(len(query), keys.shape[1], -1, query.shape[3])
    # No module: it would say that heads share keys and values.
    found: Tensor = attend(None, packed, keys, values, attention_mask, **kwargs)[0]
    # (N, G K, H / G, d), as the model expects it with all heads of a token side by side.
    apart = found.transpose(1, 2).reshape(len(query), heads, count, -1)
    return apart.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(CAUSAL, _causal)
ALL_ATTENTION_FUNCTIONS.register(RING, _ring)
