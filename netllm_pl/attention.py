"""Attention for passes that never change their shape, registered among that of transformers.

Shapes: N sequences, H heads, G of them share keys and values, K tokens a pass, T places of keys and values, d size of a
head.
"""

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL = "netllm_pl_causal"
"""Each token sees all before it: without a mask, which faster kernels do not take, and which shared heads are copied
for."""
RING = "netllm_pl_ring"
"""Keys and values in fixed places, see `netllm_pl.streaming`."""


def go_maskless(model: Any, wanted: bool, length: int = 0) -> bool:
    """Let a model of transformers attend without a mask, if it can, or as it did before, in the next passes.

    It makes masks of its own by looking at positions, for which a GPU and the program would wait for each other, and
    other ones while a graph is captured than before.

    Args:
        model: With or without PEFT's layers.
        wanted: Whether each token is to see all before it.
        length: Tokens of a sequence (T); some models see a part of long ones only.

    Returns:
        Whether it does.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    wanted = wanted and (window is None or length < window)
    if not wanted and config._attn_implementation == CAUSAL:
        config._attn_implementation = "sdpa"
    elif wanted and config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        config._attn_implementation = CAUSAL
    return bool(config._attn_implementation == CAUSAL)


def shared_heads(model: Any) -> int:
    """How many heads share keys and values (G); 1 if layers differ in that."""
    found = {int(getattr(part, "num_key_value_groups", 1)) for part in model.modules() if hasattr(part, "layer_idx")}
    return found.pop() if len(found) == 1 else 1


def _causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as ``sdpa`` does, with a mask if there is one: a layer may be recomputed after another pass."""
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **{**kwargs, "is_causal": True})
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
