"""One decoder layer at work: the model's own forward in float32, without its experts' weights.

The layer's module comes from transformers, so attention, routing and residual arithmetic are the model's own. Experts
are a callback, because their weights never sit in memory all at once.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from codequant.structure import LayerStructure

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [N, H], top_k_index [N, k], top_k_weights [N, k]) -> [N, H]
IMPLEMENTATION = "codequant_working_layer"


class Routed(NamedTuple):
    """What the experts of a layer are handed."""

    x: Tensor  # [N, H] normed residual
    top_k_index: Tensor  # int64 [N, k]
    top_k_weights: Tensor  # [N, k]


class _Captured(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


def _call_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return module.working_experts(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _call_experts)


class WorkingLayer:
    """A decoder layer whose non-expert tensors are given; runs on batches of windows [B, T, H]."""

    def __init__(
        self, layer: nn.Module, structure: LayerStructure, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """layer: on the meta device, left untouched. arguments: its keyword arguments for windows of length T."""
        self.structure = structure
        self.arguments = dict(arguments)
        self.module = copy.deepcopy(layer).eval()
        for path, tensor in tensors.items():
            owner, name = self._owner(path)
            if name in owner._buffers:
                owner._buffers[name] = tensor
            else:
                owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        for module in self.module.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = IMPLEMENTATION

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        parent, _, name = path.rpartition(".")
        return self.module.get_submodule(parent), name

    def weight(self, reader: str) -> Tensor:
        return self.module.get_submodule(reader).weight.data

    def replace(self, reader: str, weight: Tensor, transform_input: Callable[[Tensor], Tensor] | None) -> None:
        """Give a linear map or router a new weight and, from now on, a transform of its input."""
        module = self.module.get_submodule(reader)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if transform_input is not None:
            module.register_forward_pre_hook(lambda _, args: (transform_input(args[0]), *args[1:]))

    def move_outputs(self, reader: str, order: Tensor) -> None:
        """Put a linear map's output channels, with their biases, in the order int64 [O]."""
        module = self.module.get_submodule(reader)
        for name in ("weight", "bias"):
            if (parameter := getattr(module, name, None)) is not None:
                module._parameters[name] = nn.Parameter(parameter.data[order], requires_grad=False)

    def run(self, x: Tensor, experts: Experts | None = None) -> Tensor:
        """The layer's output [B, T, H]; `experts` answers for the experts module."""
        if self.structure.experts is not None:
            self.module.get_submodule(self.structure.experts.path).working_experts = experts
        with torch.no_grad():
            result = self.module(x, **self.arguments)
        return result[0] if isinstance(result, tuple) else result

    def dense_part(self, x: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The layer without its experts: (its output [B, T, H], what the experts are handed [N, H]).

        `weights` replaces tensors by their path in the layer; the result can be differentiated by them.
        """
        handed: list[Tensor] = []

        def no_experts(x: Tensor, *_: Tensor) -> Tensor:
            handed.append(x)
            return torch.zeros_like(x)

        if self.structure.experts is not None:
            self.module.get_submodule(self.structure.experts.path).working_experts = no_experts
        result = torch.func.functional_call(self.module, dict(weights), (x,), self.arguments)
        return result[0] if isinstance(result, tuple) else result, handed[0] if handed else None

    @contextmanager
    def observing(self, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Outputs of the named modules, filled in by runs inside the block."""
        seen: dict[str, Tensor] = {}

        def remember(path: str) -> Callable:
            return lambda module, args, output: seen.__setitem__(path, output)

        handles = [self.module.get_submodule(p).register_forward_hook(remember(p)) for p in paths]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def input_of(self, reader: str, x: Tensor) -> Tensor:
        """What `reader` is handed, [B * T, I], before its own input transform; stops there."""

        def capture(_: nn.Module, args: tuple) -> None:
            raise _Captured(args[0].reshape(-1, args[0].shape[-1]))

        handle = self.module.get_submodule(reader).register_forward_pre_hook(capture, prepend=True)
        try:
            return self._run_until_captured(x)
        finally:
            handle.remove()

    def routed(self, x: Tensor) -> Routed:
        """What the experts are handed; stops there."""

        def capture(*args: Tensor) -> Tensor:
            raise _Captured(Routed(*args))

        return self._run_until_captured(x, capture)

    def _run_until_captured(self, x: Tensor, experts: Experts | None = None) -> Any:
        def no_experts(x: Tensor, *_: Tensor) -> Tensor:
            return torch.zeros_like(x)  # a shared expert's inner site may come after the experts: they do not feed it

        try:
            self.run(x, experts or no_experts)
        except _Captured as captured:
            return captured.value
        raise RuntimeError("the layer never reached the module that its structure names")
