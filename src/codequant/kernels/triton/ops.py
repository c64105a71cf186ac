"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs take them as they are.

A feed-forward is `route`, `expert_up` and `expert_down`; between the last two the caller may apply what no kernel
fuses. Which kernel runs is decided inside, by the number of tokens: small batches use the decode kernel, which needs no
routing (its lists are then left unwritten) and keeps the intermediate in the order of the pairs; larger ones use
expert-sorted blocks, and the intermediate is in expert order. What is between them must therefore treat rows alike.
The three must agree on block sizes, so all are told `layer_bits`, the wider of the layer's two activation widths.
Very many tokens of 16 bits meet dequantized weights, in the same order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.kernels.triton.activation import quantize
from codequant.kernels.triton.combine import combine
from codequant.kernels.triton.decode import decode
from codequant.kernels.triton.dense import ALIGNMENT, dense_experts, dequantize, gate, weighted_pairs
from codequant.kernels.triton.dispatch import DECODED_TOKENS, WIDE, decodes, generation
from codequant.kernels.triton.grouped import grouped
from codequant.kernels.triton.layout import TritonWeight
from codequant.kernels.triton.routing import Routing, empty_routing
from codequant.kernels.triton.routing import route as launch_route


def _weight(tensors: list[Tensor], in_features: int) -> TritonWeight:
    words, table, step, row_sum = tensors
    return TritonWeight(words, table, step, row_sum, in_features, bits=4, stacked=True)


def _planes(activation_bits: int) -> int:
    return 2 if activation_bits == 16 else 1


def _dense(x: Tensor, weight: TritonWeight, activation_bits: int, tokens_per_expert: float) -> bool:
    """Whether experts are dequantized: enough bfloat16 activations, and shapes that the library takes (for float16 it
    loops over experts on the host)."""
    aligned = weight.in_features % ALIGNMENT == 0 and weight.out_features % ALIGNMENT == 0
    enough = generation(x.device).dense_experts.serves(tokens_per_expert, weight.in_features)
    return activation_bits == 16 and x.dtype == torch.bfloat16 and aligned and enough


@torch.library.custom_op("codequant::triton_linear", mutates_args=())
def linear(
    x: Tensor, weight: list[Tensor], in_features: int, bias: Tensor | None, activation_bits: int, clip: float
) -> Tensor:
    """x [T, I] and the tensors of a TritonWeight -> [T, O] in x's dtype."""
    w, x, chip, planes = _weight(weight, in_features), x.contiguous(), generation(x.device), _planes(activation_bits)
    tokens, pdl = len(x), len(x) <= chip.pdl_rows
    if tokens == 0:
        return x.new_empty(0, w.out_features)
    if planes == 2 and x.itemsize == 2 and chip.dense_linear.serves(tokens, in_features):
        return F.linear(x, dequantize(w, x.dtype)[0], None if bias is None else bias.to(x.dtype))
    q = quantize(x, w.groups, activation_bits, clip, pdl, overlap="after")
    if tokens <= DECODED_TOKENS:
        return decode(q, w, bias, None, None, 1, False, "none", planes, x.dtype, chip.decode_linear[planes], pdl)
    config = chip.pick_linear(planes, tokens * w.out_features)
    return grouped(q, w, bias, None, None, 1, False, "none", planes, x.dtype, config.tokens, config.tile, pdl)


@linear.register_fake
def _(x, weight, in_features, bias, activation_bits, clip):
    return x.new_empty(x.shape[0], weight[0].shape[1])


@torch.library.custom_op("codequant::triton_route", mutates_args=())
def route(expert: Tensor, experts: int, layer_bits: int) -> list[Tensor]:
    """expert [T, top_k] -> the tensors of a Routing, whose blocks suit activations of so many bits."""
    chip, pairs = generation(expert.device), expert.numel()
    if decodes(len(expert), pairs, experts, _planes(layer_bits)):
        return empty_routing(expert, experts).tensors
    config = chip.pick(_planes(layer_bits), pairs / experts)
    return launch_route(expert.contiguous(), experts, config.tokens, pairs <= chip.pdl_rows).tensors


@route.register_fake
def _(expert, experts, layer_bits):
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
    layer_bits: int,
) -> Tensor:
    """x [T, I], expert [T, top_k] -> activation(gate) * up [T * top_k, M] where gated, else activation(W x)."""
    w, x, chip, planes = _weight(weight, in_features), x.contiguous(), generation(x.device), _planes(activation_bits)
    expert, (tokens, top_k) = expert.contiguous(), expert.shape
    pdl = expert.numel() <= chip.pdl_rows
    if _dense(x, w, activation_bits, expert.numel() / len(w.words)):
        lists = Routing(*routing)
        return gate(dense_experts(x[lists.pair // top_k], w, bias, expert, lists), gated, activation)
    if decodes(tokens, expert.numel(), len(w.words), _planes(layer_bits)):
        q = quantize(x, w.groups, activation_bits, clip, pdl)
        return decode(q, w, bias, expert, None, top_k, gated, activation, planes, x.dtype, chip.decode_up, pdl)
    q = quantize(x, w.groups, activation_bits, clip, pdl, overlap="before")
    config = chip.pick(_planes(layer_bits), expert.numel() / len(w.words))
    return grouped(
        q, w, bias, Routing(*routing), None, top_k, gated, activation, planes, x.dtype, config.tokens, config.up, pdl
    )  # fmt: skip


@expert_up.register_fake
def _(x, expert, routing, weight, in_features, bias, gated, activation, activation_bits, clip, layer_bits):
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
    layer_bits: int,
) -> Tensor:
    """hidden [T * top_k, M] of `expert_up`, expert and pair_weight [T, top_k] -> [T, O] in hidden's dtype."""
    w, hidden, chip = _weight(weight, in_features), hidden.contiguous(), generation(hidden.device)
    expert, pair_weight, (tokens, top_k) = expert.contiguous(), pair_weight.contiguous(), expert.shape
    planes, pdl = _planes(activation_bits), expert.numel() <= chip.pdl_rows
    if _dense(hidden, w, activation_bits, expert.numel() / len(w.words)):
        lists = Routing(*routing)
        y = weighted_pairs(dense_experts(hidden, w, bias, expert, lists), pair_weight, lists)
        return combine(y, expert, len(w.words), top_k, hidden.dtype, pdl)
    q = quantize(hidden, w.groups, activation_bits, clip, pdl, overlap="after")  # `expert_up` has waited for the lists
    if decodes(tokens, expert.numel(), len(w.words), _planes(layer_bits)):
        down = chip.pick_down(tokens, top_k)
        return decode(q, w, bias, expert, pair_weight, top_k, False, "none", planes, hidden.dtype, down, pdl)
    block = chip.pick(_planes(layer_bits), expert.numel() / len(w.words))
    tile = block.wide_down if in_features > WIDE else block.down
    y = grouped(
        q, w, bias, Routing(*routing), pair_weight, top_k, False, "none", planes, hidden.dtype, block.tokens, tile, pdl
    )  # fmt: skip
    return combine(y, expert, len(w.words), top_k, hidden.dtype, pdl)


@expert_down.register_fake
def _(hidden, expert, pair_weight, routing, weight, in_features, bias, activation_bits, clip, layer_bits):
    return hidden.new_empty(expert.shape[0], weight[0].shape[1])
