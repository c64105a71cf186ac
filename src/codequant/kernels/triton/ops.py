"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs take them as they are.

A feed-forward is `route`, `expert_up` and `expert_down`; between the last two the caller may apply what no kernel
fuses. Which kernel runs is decided inside, by the number of tokens: small batches use the decode kernel, which needs no
routing (its lists are then left unwritten) and keeps the intermediate in the order of the pairs; larger ones use
expert-sorted blocks, and the intermediate is in expert order. What is between them must therefore treat rows alike.
The three must agree on block sizes, so all are told `layer_bits`, the wider of the layer's two activation widths.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.kernels.triton.activation import quantize
from codequant.kernels.triton.combine import combine
from codequant.kernels.triton.decode import decode
from codequant.kernels.triton.dense import dequantize
from codequant.kernels.triton.dispatch import DECODED_TOKENS, decode_form, exact_a16, generation
from codequant.kernels.triton.grouped import grouped
from codequant.kernels.triton.layout import TritonWeight
from codequant.kernels.triton.routing import Routing, empty_routing
from codequant.kernels.triton.routing import route as launch_route
from codequant.kernels.triton.single import single_down, single_up


def _weight(tensors: list[Tensor], in_features: int) -> TritonWeight:
    words, table, paired, step, row_sum = tensors
    return TritonWeight(words, table, paired, step, row_sum, in_features, bits=4, stacked=True)


@torch.library.custom_op("codequant::triton_linear", mutates_args=())
def linear(
    x: Tensor, weight: list[Tensor], in_features: int, bias: Tensor | None, activation_bits: int, clip: float
) -> Tensor:
    """x [T, I] and the tensors of a TritonWeight -> [T, O] in x's dtype."""
    w, x, chip = _weight(weight, in_features), x.contiguous(), generation(x.device)
    tokens, pdl = len(x), chip.pdl(len(x))
    if tokens == 0:
        return x.new_empty(0, w.out_features)
    if activation_bits == 16 and x.itemsize == 2 and tokens >= chip.dense_tokens and not exact_a16():
        return F.linear(x, dequantize(w, x.dtype)[0], None if bias is None else bias.to(x.dtype))
    decoded = tokens <= DECODED_TOKENS
    form = decode_form(activation_bits) if decoded else chip.form(activation_bits, 0)
    q = quantize(x, w.groups, activation_bits, clip, form, pdl, overlap="after")
    if decoded:
        return decode(q, w, bias, None, None, 1, False, "none", x.dtype, chip.decode_linear[form], pdl)
    config = chip.pick_linear(form, tokens * w.out_features)
    return grouped(q, w, bias, None, None, 1, False, "none", x.dtype, config.tokens, config.tile, pdl)


@linear.register_fake
def _(x, weight, in_features, bias, activation_bits, clip):
    return x.new_empty(x.shape[0], weight[0].shape[1])


@torch.library.custom_op("codequant::triton_route", mutates_args=())
def route(expert: Tensor, experts: int, layer_bits: int) -> list[Tensor]:
    """expert [T, top_k] -> the tensors of a Routing, whose blocks suit activations of so many bits."""
    chip, pairs = generation(expert.device), expert.numel()
    config = chip.pick(layer_bits, len(expert), pairs, experts)
    if config is None:
        return empty_routing(expert, experts).tensors
    return launch_route(expert.contiguous(), experts, config.tokens, chip.routing_pdl).tensors


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
    w, x, chip = _weight(weight, in_features), x.contiguous(), generation(x.device)
    expert, (tokens, top_k) = expert.contiguous(), expert.shape
    pairs, experts = expert.numel(), len(w.words)
    pdl = chip.pdl(pairs)
    config = chip.pick(layer_bits, tokens, pairs, experts)
    if config is None:
        form, rows = decode_form(activation_bits), w.out_features // 2 if gated else w.out_features
        if tokens == 1 and chip.takes_single_up(form, top_k, rows, w.words.shape[2], w.groups):
            programs = 2 * chip.multiprocessors
            return single_up(
                x, w, bias, expert, gated, activation, activation_bits, clip, programs, chip.single_up, pdl
            )  # fmt: skip
        q = quantize(x, w.groups, activation_bits, clip, form, pdl)
        return decode(q, w, bias, expert, None, top_k, gated, activation, x.dtype, chip.decode_up[form], pdl)
    q = quantize(x, w.groups, activation_bits, clip, chip.form(activation_bits, pairs / experts), pdl, overlap="before")
    tile = config.pick_up(in_features)
    return grouped(
        q, w, bias, Routing(*routing), None, top_k, gated, activation, x.dtype, config.tokens, tile, pdl
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
    pairs, experts = expert.numel(), len(w.words)
    pdl = chip.pdl(pairs)
    config = chip.pick(layer_bits, tokens, pairs, experts)
    form = decode_form(activation_bits) if config is None else chip.form(activation_bits, pairs / experts)
    if tokens == 1 and chip.takes_single_down(form, w.words.shape[2], w.groups):
        single = chip.pick_single_down(in_features)
        return single_down(hidden, w, bias, expert, pair_weight, activation_bits, clip, single, pdl)
    # What comes next reads the lists before it waits: `expert_up` has waited for them.
    q = quantize(hidden, w.groups, activation_bits, clip, form, pdl, overlap="after")
    if config is None:
        down = chip.pick_decode_down(tokens, top_k)
        return decode(q, w, bias, expert, pair_weight, top_k, False, "none", hidden.dtype, down, pdl)
    tile = config.pick_down(in_features)
    y = grouped(
        q, w, bias, Routing(*routing), pair_weight, top_k, False, "none", hidden.dtype, config.tokens, tile, pdl
    )  # fmt: skip
    return combine(y, expert, experts, top_k, hidden.dtype, pdl)


@expert_down.register_fake
def _(hidden, expert, pair_weight, routing, weight, in_features, bias, activation_bits, clip, layer_bits):
    return hidden.new_empty(expert.shape[0], weight[0].shape[1])
