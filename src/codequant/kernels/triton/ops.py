"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs take them as they are.

A feed-forward is `route`, `expert_up` and `expert_down`; between the last two the caller may apply what no kernel
fuses. Which kernel runs is decided inside, by the number of tokens: small batches use the decode kernel, which needs no
routing (its lists are then left unwritten) and keeps the intermediate in the order of the pairs; larger ones use
expert-sorted blocks, and the intermediate is in expert order. What is between them must therefore treat rows alike.
"""

import torch
from torch import Tensor

from codequant.kernels.triton.activation import quantize
from codequant.kernels.triton.combine import combine
from codequant.kernels.triton.decode import decode
from codequant.kernels.triton.dispatch import generation
from codequant.kernels.triton.grouped import grouped
from codequant.kernels.triton.layout import TritonWeight
from codequant.kernels.triton.routing import Routing, empty_routing
from codequant.kernels.triton.routing import route as launch_route


def _weight(tensors: list[Tensor], in_features: int) -> TritonWeight:
    words, table, step, row_sum = tensors
    return TritonWeight(words, table, step, row_sum, in_features, bits=4, stacked=True)


@torch.library.custom_op("codequant::triton_linear", mutates_args=())
def linear(
    x: Tensor, weight: list[Tensor], in_features: int, bias: Tensor | None, activation_bits: int, clip: float
) -> Tensor:
    """x [T, I] and the tensors of a TritonWeight -> [T, O] in x's dtype."""
    w, x, chip = _weight(weight, in_features), x.contiguous(), generation(x.device)
    if len(x) == 0:
        return x.new_empty(0, w.out_features)
    q = quantize(x, w.groups, activation_bits, clip, chip.pdl)
    planes = 2 if activation_bits == 16 else 1
    if len(x) <= chip.decode_tokens:
        return decode(q, w, bias, None, None, 1, False, "none", planes, x.dtype, chip.decode_up, chip.pdl)
    config = chip.pick(len(x))
    return grouped(
        q, w, bias, None, None, 1, False, "none", planes, x.dtype, config.tokens, config.down, config.rows_first,
        chip.pdl,
    )  # fmt: skip


@linear.register_fake
def _(x, weight, in_features, bias, activation_bits, clip):
    return x.new_empty(x.shape[0], weight[0].shape[1])


@torch.library.custom_op("codequant::triton_route", mutates_args=())
def route(expert: Tensor, experts: int) -> list[Tensor]:
    """expert [T, top_k] -> the tensors of a Routing."""
    chip = generation(expert.device)
    if len(expert) <= chip.decode_tokens:
        return empty_routing(expert, experts).tensors
    config = chip.pick(expert.numel() / experts)
    return launch_route(expert.contiguous(), experts, config.tokens, chip.pdl).tensors


@route.register_fake
def _(expert, experts):
    return empty_routing(expert, experts).tensors


@torch.library.custom_op("codequant::triton_expert_up", mutates_args=())
def expert_up(
    x: Tensor,
    expert: Tensor,
    routing: list[Tensor],
    weight: list[Tensor],
    in_features: int,
    bias: Tensor | None,
    gated: bool,
    activation: str,
    activation_bits: int,
    clip: float,
) -> Tensor:
    """x [T, I], expert [T, top_k] -> activation(gate) * up [T * top_k, M] where gated, else activation(W x)."""
    w, x, chip = _weight(weight, in_features), x.contiguous(), generation(x.device)
    expert = expert.contiguous()
    top_k = expert.shape[1]
    q = quantize(x, w.groups, activation_bits, clip, chip.pdl)
    planes = 2 if activation_bits == 16 else 1
    if len(x) <= chip.decode_tokens:
        return decode(q, w, bias, expert, None, top_k, gated, activation, planes, x.dtype, chip.decode_up, chip.pdl)
    config = chip.pick(expert.numel() / len(w.words))
    return grouped(
        q, w, bias, Routing(*routing), None, top_k, gated, activation, planes, x.dtype, config.tokens, config.up,
        config.rows_first, chip.pdl,
    )  # fmt: skip


@expert_up.register_fake
def _(x, expert, routing, weight, in_features, bias, gated, activation, activation_bits, clip):
    rows = weight[0].shape[1]
    return x.new_empty(expert.numel(), rows // 2 if gated else rows)


@torch.library.custom_op("codequant::triton_expert_down", mutates_args=())
def expert_down(
    hidden: Tensor,
    expert: Tensor,
    pair_weight: Tensor,
    routing: list[Tensor],
    weight: list[Tensor],
    in_features: int,
    bias: Tensor | None,
    activation_bits: int,
    clip: float,
) -> Tensor:
    """hidden [T * top_k, M] of `expert_up`, expert and pair_weight [T, top_k] -> [T, O] in hidden's dtype."""
    w, hidden, chip = _weight(weight, in_features), hidden.contiguous(), generation(hidden.device)
    expert, pair_weight = expert.contiguous(), pair_weight.contiguous()
    tokens, top_k = expert.shape
    q = quantize(hidden, w.groups, activation_bits, clip, chip.pdl)
    planes = 2 if activation_bits == 16 else 1
    if tokens <= chip.decode_tokens:
        return decode(
            q, w, bias, expert, pair_weight, top_k, False, "none", planes, hidden.dtype, chip.decode_down, chip.pdl
        )  # fmt: skip
    config = chip.pick(expert.numel() / len(w.words))
    y = grouped(
        q, w, bias, Routing(*routing), pair_weight, top_k, False, "none", planes, hidden.dtype, config.tokens,
        config.down, config.rows_first, chip.pdl,
    )  # fmt: skip
    return combine(y, expert, len(w.words), top_k, hidden.dtype, chip.pdl)


@expert_down.register_fake
def _(hidden, expert, pair_weight, routing, weight, in_features, bias, activation_bits, clip):
    return hidden.new_empty(expert.shape[0], weight[0].shape[1])
