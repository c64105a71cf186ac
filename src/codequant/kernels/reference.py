"""The readable twin of every kernel: these functions define the result; the fast backends must match them.

Letters: T tokens, I input and O output channels, G codebook groups per row, E experts, M intermediate channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.packing import PackedParts, PackedWeight, unpack

FULL_PRECISION = 16  # activation bits that mean "not quantized"


@dataclass(frozen=True)
class QuantizedActivation:
    """Per-token asymmetric integers: x[t, i] ~ lo[t] + step[t] * level[t, i]."""

    level: Tensor  # uint8 [T, I], 0 .. 2**bits - 1
    step: Tensor  # float32 [T, 1]
    lo: Tensor  # float32 [T, 1]


def quantize_activation(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedActivation:
    """Dynamic per-token asymmetric min-max quantization of x [T, I] (any float dtype; the arithmetic is float32).

    The range [min, max] is scaled by `clip` first. A constant token has step 0 and is represented exactly by `lo`.
    The level is round_half_even((x - lo) * inverse) with inverse = 1 / (hi - lo) * (2**bits - 1), a product and not a
    quotient, so that every backend that follows this order of operations gets the same integers.
    """
    x = x.float()
    lo, hi = x.amin(-1, keepdim=True) * clip, x.amax(-1, keepdim=True) * clip  # [T, 1]
    levels = 2**bits - 1
    width = hi - lo
    inverse = torch.where(width > 0, width.reciprocal() * levels, 0.0)
    level = ((x - lo) * inverse).round().clamp(0, levels).to(torch.uint8)
    return QuantizedActivation(level, width / levels, lo)


def dequantize_activation(q: QuantizedActivation) -> Tensor:
    """float32 [T, I]."""
    return q.lo + q.step * q.level.float()


def fake_quantize(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """x [..., I] through `quantize_activation` and back, in x's dtype; unchanged at 16 bits."""
    if bits >= FULL_PRECISION:
        return x
    return dequantize_activation(quantize_activation(x, bits, clip)).to(x.dtype)


def codebook_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    activation_bits: int = FULL_PRECISION,
    clip: float = 1.0,
) -> Tensor:
    """y [..., O] = x [..., I] @ W.T + bias, accumulated in float32 (float64 for float64 x) and returned in x's dtype.

    With activation_bits 4 or 8, x is quantized per token and the product is taken on the integers:

        y[t, o] = sum_g wstep[o, g] * (xstep[t] * sum_i level[t, i] * entry[o, i] + lo[t] * sum_i entry[o, i])

    where i runs over group g. The last sum is a constant of the weight (its row sum): the zero point costs one
    multiply-add per row and group, and the correction is exact.
    """
    shape, dtype = x.shape, x.dtype
    x = x.reshape(-1, shape[-1])
    if activation_bits >= FULL_PRECISION:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        y = x.to(compute) @ unpack(weight).to(compute).T
    else:
        q = quantize_activation(x, activation_bits, clip)
        O, G = weight.step.shape
        entries = unpack(PackedWeight(weight.packed, weight.codebook, torch.ones_like(weight.step), weight.in_features))
        entries = entries.view(O, G, -1)  # integers in float32
        # A float32 sum of integers is exact below 2**24, and 255 * 127 * I passes that at I = 519: use float64.
        level = q.level.double().view(len(x), G, -1)
        dot = torch.einsum("tgi,ogi->tog", level, entries.double())  # [T, O, G]
        row_sum = entries.double().sum(-1)  # [O, G]
        per_group = q.step.double().unsqueeze(-1) * dot + q.lo.double().unsqueeze(-1) * row_sum
        y = (per_group * weight.step.double()).sum(-1).float()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(dtype).reshape(*shape[:-1], -1)


@dataclass(frozen=True)
class ExpertWeights:
    """The feed-forward experts of one layer, in one canonical layout whatever the checkpoint's flags were:
    rows are output channels, gate rows come before up rows."""

    gate_up: PackedWeight | PackedParts | Tensor  # [E, 2M, I] with a gate, else [E, M, I]; a Tensor is not quantized
    down: PackedWeight | PackedParts | Tensor  # [E, O, M]
    apply_gate: Callable[[Tensor], Tensor]  # [T, 2M] (or [T, M] without a gate) -> [T, M]
    activation: str | None = "silu"  # name of a plain act(gate) * up, which kernels may fuse; None: only apply_gate
    has_gate: bool = True
    gate_up_bias: Tensor | None = None  # [E, 2M]
    down_bias: Tensor | None = None  # [E, O]
    input_bits: int = FULL_PRECISION  # activation bits of x, read by gate_up
    input_clip: float = 1.0
    down_bits: int = FULL_PRECISION  # activation bits of the intermediate, read by down
    down_clip: float = 1.0
    down_transform: Callable[[Tensor], Tensor] | None = None  # online Hadamard before down, [T, M] -> [T, M]


def join(weight: PackedWeight | PackedParts | Tensor) -> PackedWeight | Tensor:
    """A weight of ExpertWeights in one piece."""
    return weight.join() if isinstance(weight, PackedParts) else weight


def _expert_linear(
    x: Tensor, weight: PackedWeight | Tensor, expert: int, bias: Tensor | None, bits: int, clip: float
) -> Tensor:
    row_bias = None if bias is None else bias[expert]
    if isinstance(weight, Tensor):
        return F.linear(
            fake_quantize(x, bits, clip), weight[expert].to(x.dtype), None if row_bias is None else row_bias.to(x.dtype)
        )
    return codebook_linear(x, weight.matrix(expert), row_bias, bits, clip)


def codebook_experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """y[t] = sum_k top_k_weights[t, k] * down(gate(x[t])) of expert top_k_index[t, k].

    x [T, I] float, top_k_index [T, k] int64, top_k_weights [T, k] float -> [T, O] in x's dtype. The intermediate and
    the sum over experts stay in float32 (float64 for float64 x). An index >= E is the sentinel of expert parallelism:
    it contributes nothing.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate_up, down = join(experts.gate_up), join(experts.down)
    num_experts, out_features = down.shape[:2] if isinstance(down, Tensor) else down.packed.shape[:2]
    y = torch.zeros(len(x), out_features, dtype=compute, device=x.device)
    for expert in torch.unique(top_k_index).tolist():
        if not 0 <= expert < num_experts:
            continue
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        hidden = x[token].to(compute)
        hidden = _expert_linear(hidden, gate_up, expert, experts.gate_up_bias, experts.input_bits, experts.input_clip)
        hidden = experts.apply_gate(hidden)
        if experts.down_transform is not None:
            hidden = experts.down_transform(hidden)
        out = _expert_linear(hidden, down, expert, experts.down_bias, experts.down_bits, experts.down_clip)
        y.index_add_(0, token, out * top_k_weights[token, slot, None].to(compute))
    return y.to(x.dtype)


# The interface of codequant.kernels.Backend: this one computes on the format itself, so there is little to prepare.


def unavailable(device_type: str) -> str | None:
    return None


def prepare_linear(weight: PackedWeight) -> PackedWeight:
    return weight


def prepare_experts(experts: ExpertWeights) -> ExpertWeights:
    return replace(experts, gate_up=join(experts.gate_up), down=join(experts.down))


def restore(prepared: PackedWeight | ExpertWeights) -> PackedWeight | ExpertWeights:
    return prepared


linear = codebook_linear
experts = codebook_experts
