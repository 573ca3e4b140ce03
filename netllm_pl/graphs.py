"""CUDA graphs: what is launched once and replayed as a whole. On a CPU the same functions run without one."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WARMUP = 3
"""Runs before a capture: they compile, choose kernels and allocate workspaces."""


@contextmanager
def normal_mode() -> Iterator[None]:
    """Make tensors that can be written to anywhere, also where inference mode is on; no gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Places:
    """Where the weights of a module lie: what was captured reads from there.

    Walking through the modules of a large language model takes milliseconds, so that is done once; afterwards only
    tables are compared.

    Args:
        module: Of the weights and buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        tables: list[dict[str, Any]] = [
            table for part in parts for table in (part._parameters, part._buffers, part._modules) if table
        ]
        self.tables = tables
        self.held = self._now()  # references, so that no other object gets the identity of one of these
        tensors = [thing for thing in self.held if isinstance(thing, Tensor)]
        # Some quantised ones have no address.
        self.tensors = [tensor for tensor in tensors if not is_traceable_wrapper_subclass(tensor)]
        self.addresses = self._addresses()

    def _now(self) -> list[Any]:
        return [thing for table in self.tables for thing in table.values()]

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors]

    def hold(self) -> bool:
        """Whether the module still has the same parts, and its weights lie where they were."""
        held = self._now()
        same = len(held) == len(self.held) and all(map(operator.is_, held, self.held))
        return same and self._addresses() == self.addresses


class Captured:
    """A function of tensors in fixed places: on a GPU captured in a graph at its first call, then replayed.

    Args:
        function: Reads tensors that stay where they are, waits for nothing, and returns tensors.
        capture: Whether to capture it; else it is called every time.
    """

    def __init__(self, function: Callable[[], Any], capture: bool) -> None:
        self.function, self.capture = function, capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Any:
        """Return what the function returns; a replay writes over the tensors of the last one."""
        if not self.capture:
            return self.function()
        if self.graph is None:
            with uncached_autocast("cuda"):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARMUP):
                        self.function()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.result = self.function()
            self.graph = graph
        self.graph.replay()
        return self.result


class LearningGraph:
    """Forward and backward pass of a language model in training, captured for the first shape that comes.

    Args:
        model: Takes what models of transformers take.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.learning = [weight for weight in model.parameters() if weight.requires_grad]
        self.known: Any = None
        self.run: nn.Module | None = None
        self.places: Places | None = None

    def __call__(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """Return the last hidden states (B, T, d_hidden), or None for a shape that is not the first one's."""
        given = [tensor for tensor in (tokens, mask, positions) if tensor is not None]
        asked = [(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in given]
        known = asked, mask is None
        if self.run is None or self.places is None or not self.places.hold():
            samples = tuple(torch.randn_like(t) if t.is_floating_point() else t.clone() for t in given)
            samples = tuple(s.requires_grad_(t.requires_grad) for s, t in zip(samples, given, strict=True))
            last = _Last(self.model, mask is not None, positions is not None).train()
            # Gradients come from a replay, which has been waited for, whatever stream they were once captured on.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            with uncached_autocast(tokens.device.type):
                self.run = torch.cuda.make_graphed_callables(last, samples, allow_unused_input=True)  # type: ignore[assignment]
            self.known, self.places = known, Places(self.model)
        if known != self.known:
            return None
        for weight in self.learning:
            if weight.grad is not None:  # gradients add up: the next pass must not write over what there is
                weight.grad = weight.grad.clone()
        hidden: Tensor = self.run(*given)  # type: ignore[misc]
        return hidden


def uncached_autocast(device: str) -> torch.autocast:
    """Mixed precision as it is now, but casting weights anew at each use: a graph must not read casts of before it."""
    return torch.autocast(
        device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
    )


class _Last(nn.Module):
    """The last hidden states as a function of tensors alone."""

    def __init__(self, model: nn.Module, masked: bool, placed: bool) -> None:
        super().__init__()
        self.model, self.masked, self.placed = model, masked, placed

    def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
        mask = rest[0] if self.masked else None
        positions = {"position_ids": rest[-1]} if self.placed else {}
        output = self.model(inputs_embeds=tokens, attention_mask=mask, use_cache=False, **positions)
        hidden: Tensor = output.last_hidden_state
        return hidden
