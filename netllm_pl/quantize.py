"""Fewer bits for the frozen weights: linear layers in int8 (torchao) or NF4 (bitsandbytes), replaced in place.

In place, and after loading, so that it works alike for hub ids, GGUF files, cut layers and random weights. PEFT puts
LoRA on both kinds of layers by itself.
"""

import importlib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from netllm_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from netllm_pl.random_weights import Draw

Bits = Literal["int8", "nf4"]
BLOCK = 64
"""Numbers that share a scale in NF4."""


def quantize(model: "PreTrainedModel", bits: Bits, compute: torch.dtype, draw: "Draw | None" = None) -> None:
    """Store the weights of all linear layers with fewer bits; norms, biases and position vectors stay as they are.

    A GPU does it, one layer at a time, if there is one: the weights of a 7B model take minutes on a CPU. They lie where
    they were afterwards.

    Args:
        model: Float weights.
        bits: ``int8``: a scale for each output, activations stay as they are. ``nf4``: blocks of 64 numbers with a
            scale each, itself in 8 bits (QLoRA; Dettmers et al., 2023, arXiv:2305.14314).
        compute: Type in which the layers multiply.
        draw: Draws the weights of a layer that has none yet, just before it is quantised: all of them at once may take
            more memory than there is.

    Raises:
        ModuleNotFoundError: The extra ``quantize`` is not installed.
        UserError: A layer has inputs that are no multiple of a block of NF4.
    """
    from transformers.pytorch_utils import Conv1D

    library: Any = importlib.import_module("torchao.quantization" if bits == "int8" else "bitsandbytes")
    worker = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # T5 computes the last part of a block in float32 and looks at the type of its weights for that.
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    found = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    for name in found:
        above, _, own = name.rpartition(".")
        if own in kept:
            continue
        layer = model.get_submodule(name)
        home = layer.get_parameter("weight").device
        if home.type == "meta":
            assert draw is not None
            home = torch.get_default_device()
            draw.fill(layer, name, worker, compute)
        linear = _linear(layer)
        if bits == "int8":
            linear.to(worker)
            library.quantize_(linear, library.Int8WeightOnlyConfig())
            linear.__class__ = Int8Linear
        else:
            linear = _nf4(library, linear, compute, worker)
        setattr(model.get_submodule(above), own, linear.to(home))
    if bits == "nf4":
        model.__dict__["is_loaded_in_4bit"] = True  # PEFT asks for it


class Int8Linear(nn.Linear):
    """A linear layer of frozen integers.

    torchao's own turns them into floats and keeps those for the backward pass, as large as weights that are not
    quantised. Here they are turned into floats again.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layer (..., n)."""
        if not values.requires_grad or not torch.is_grad_enabled():
            return nn.functional.linear(values, self.weight, self.bias)
        product: Tensor = _Frozen.apply(values, self.weight)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Frozen(torch.autograd.Function):
    """The product with a weight that does not learn, which is all that is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = values.dtype
        return nn.functional.linear(values, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (gradient @ weight.dequantize().to(gradient.dtype)).to(ctx.dtype), None


def weight_count(weight: Tensor) -> int:
    """Return how many numbers a weight stands for; NF4 packs two into a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(state.shape.numel())


def weight_bytes(weight: Tensor) -> int:
    """Return the bytes that a weight takes in memory, the scales of a quantised one included."""
    return sum(part.numel() * part.element_size() for part in parts_of(weight))


def parts_of(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a weight: itself, or its integers and their scales."""
    if is_traceable_wrapper_subclass(weight):
        names, _ = weight.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(weight, name))]
    return [weight.detach(), *_scales(getattr(weight, "quant_state", None))]


def _scales(state: Any) -> list[Tensor]:
    """Return what bitsandbytes keeps beside the numbers of a weight; scales have scales of their own."""
    if state is None:
        return []
    own = [part for part in vars(state).values() if isinstance(part, Tensor)]
    return own + _scales(state.state2)


def _linear(module: nn.Module) -> nn.Linear:
    """Give GPT-2's layers, which store their weights transposed, the usual form."""
    if isinstance(module, nn.Linear):
        return module
    weight = module.get_parameter("weight")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous())
    linear.bias = nn.Parameter(module.get_parameter("bias").detach())
    return linear


def _nf4(library: Any, linear: nn.Linear, compute: torch.dtype, worker: torch.device) -> nn.Linear:
    if linear.in_features % BLOCK:  # bitsandbytes 0.50 would read such weights back wrongly on a CPU
        raise UserError(
            f"backbone.quantize nf4 needs layers of {BLOCK}, 128, ... inputs, not {linear.in_features}; set int8"
        )
    layer: Any = library.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype=compute, quant_type="nf4", device="meta"
    )
    weight = library.nn.Params4bit(linear.weight.detach(), quant_type="nf4", module=layer)
    layer.weight = weight.to(worker)  # this is what quantises
    layer.bias = linear.bias
    # On some CPUs evaluation would repack the weights for a kernel that passes no gradients on, in later training too.
    layer.support_avx512bf16_for_cpu = False
    quantised: nn.Linear = layer
    return quantised
