"""Backend `triton`: codebook linear layers and experts on NVIDIA GPUs of compute capability 8.0 or newer.

layout      the kernels' weight layout          ptx         byte permutations and int8 dot products
activation  the forms of activations            routing     pairs sorted by expert, on the device
single      one token, in two launches          decode      a few tokens, on dp4a
grouped     many tokens, on tensor cores        overlapped  the same, for compute capability 9.0
combine     sum over a token's experts          dense       very many tokens, one matrix
dispatch    measured sizes per GPU generation   ops         all of it as PyTorch operators
launch      how kernels follow each other       epilogue    activation functions
clustering  exact 1-D k-means                   error_feedback  sweeps and refits of weight quantization
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codequant.kernels import reference
from codequant.kernels.reference import ExpertWeights
from codequant.kernels.triton import ops
from codequant.kernels.triton.epilogue import FUSED
from codequant.kernels.triton.layout import TritonWeight, from_triton, to_triton
from codequant.packing import PackedWeight


@dataclass(frozen=True)
class TritonExperts:
    gate_up: TritonWeight
    down: TritonWeight
    rest: ExpertWeights  # flags, biases and callables; its two weights are empty


def unavailable(device_type: str) -> str | None:
    """Needs an NVIDIA GPU with int8 tensor cores and asynchronous copies."""
    if device_type != "cuda":
        return "it runs on NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else "compute capability {}.{}, needed is 8.0".format(*capability)


def prepare_linear(weight: PackedWeight) -> TritonWeight:
    return to_triton(weight)


def linear(
    x: Tensor, prepared: TritonWeight, bias: Tensor | None = None, activation_bits: int = 16, clip: float = 1.0
) -> Tensor:
    """y [..., O] = x [..., I] @ W.T + bias, as `reference.codebook_linear`."""
    flat = x.reshape(-1, prepared.in_features)
    y = ops.linear(flat, prepared.tensors, prepared.in_features, bias, activation_bits, clip)
    return y.view(*x.shape[:-1], prepared.out_features)


def prepare_experts(experts: ExpertWeights) -> TritonExperts | ExpertWeights:
    """Layers of which only one side is quantized stay as they are, and run the reference."""
    gate_up, down = reference.join(experts.gate_up), reference.join(experts.down)
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        return replace(experts, gate_up=gate_up, down=down)
    rest = replace(experts, gate_up=torch.empty(0), down=torch.empty(0))
    return TritonExperts(to_triton(gate_up), to_triton(down), rest)


def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, prepared: TritonExperts | ExpertWeights) -> Tensor:
    """x [T, I], top_k_index and top_k_weights [T, k] -> [T, O], as `reference.codebook_experts`.

    The intermediate and each expert's result are kept in x's dtype, or the intermediate in the form in which it is
    multiplied next; the sum over experts is in float32.
    """
    if isinstance(prepared, ExpertWeights):
        return reference.codebook_experts(x, top_k_index, top_k_weights, prepared)
    up, down, rest = prepared.gate_up, prepared.down, prepared.rest
    activation = FUSED.get(rest.activation or "")
    if activation is not None and rest.down_transform is None:
        return ops.experts(
            x, top_k_index, top_k_weights,
            up.tensors, up.in_features, rest.gate_up_bias, rest.input_bits, rest.input_clip, rest.has_gate, activation,
            down.tensors, down.in_features, rest.down_bias, rest.down_bits, rest.down_clip,
        )  # fmt: skip
    layer_bits = max(rest.input_bits, rest.down_bits)
    routing = ops.route(top_k_index, len(up.words), layer_bits)
    hidden = ops.expert_up(
        x, top_k_index, routing, up.tensors, up.in_features, rest.gate_up_bias, rest.input_bits, rest.input_clip,
        activation is not None and rest.has_gate, activation or "none", layer_bits,
    )  # fmt: skip
    if activation is None:
        hidden = rest.apply_gate(hidden)
    if rest.down_transform is not None:
        hidden = rest.down_transform(hidden)
    return ops.expert_down(
        hidden, top_k_index, top_k_weights, routing, down.tensors, down.in_features, rest.down_bias, rest.down_bits,
        rest.down_clip, layer_bits,
    )  # fmt: skip


def restore(prepared: TritonWeight | TritonExperts | ExpertWeights) -> PackedWeight | ExpertWeights:
    """What was given to `prepare_linear` or `prepare_experts`, bit for bit; parts come back joined."""
    if isinstance(prepared, TritonWeight):
        return from_triton(prepared)
    if isinstance(prepared, ExpertWeights):
        return prepared
    return replace(prepared.rest, gate_up=from_triton(prepared.gate_up), down=from_triton(prepared.down))
