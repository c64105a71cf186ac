"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs take them as they are.

A feed-forward is `experts`, or, where the caller applies between its matrices what no kernel fuses, `route`,
`expert_up` and `expert_down`. Which kernel runs is decided inside, by the number of tokens: small batches use the
decode kernel, which needs no routing (its lists are then left unwritten) and keeps the intermediate in the order of the
pairs; larger ones use expert-sorted blocks, and the intermediate is in expert order. What is between them must
therefore treat rows alike. The three must agree on block sizes, so all are told `layer_bits`, the wider of the layer's
two activation widths.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.kernels.triton.activation import Activations, Form, quantize
from codequant.kernels.triton.combine import combine
from codequant.kernels.triton.decode import decode
from codequant.kernels.triton.dense import dequantize
from codequant.kernels.triton.dispatch import (
    DECODED_TOKENS,
    Generation,
    GroupedConfig,
    decode_form,
    exact_a16,
    generation,
)
from codequant.kernels.triton.grouped import grouped, overlaps, piece
from codequant.kernels.triton.launch import Launch
from codequant.kernels.triton.layout import TritonWeight
from codequant.kernels.triton.routing import Routing, empty_routing
from codequant.kernels.triton.routing import route as launch_route
from codequant.kernels.triton.single import single_down, single_up


class Matrix(NamedTuple):
    """A codebook matrix of each expert."""

    weight: TritonWeight
    bias: Tensor | None
    bits: int  # of its activations, and their clip
    clip: float


class Plan(NamedTuple):
    """What is decided by a feed-forward's sizes."""

    chip: Generation
    tokens: int
    top_k: int
    experts: int
    config: GroupedConfig | None  # None: the decode kernel

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def pdl(self) -> Launch:
        return self.chip.pdl(self.pairs)

    def form(self, bits: int) -> Form:
        return decode_form(bits) if self.config is None else self.chip.form(bits, self.pairs / self.experts)


def make_plan(expert: Tensor, experts: int, layer_bits: int) -> Plan:
    chip, (tokens, top_k) = generation(expert.device), expert.shape
    return Plan(chip, tokens, top_k, experts, chip.pick(layer_bits, tokens, expert.numel(), experts))


def _weight(tensors: list[Tensor], in_features: int) -> TritonWeight:
    words, table, paired, step, row_sum, norm = tensors
    return TritonWeight(words, table, paired, step, row_sum, norm, in_features, bits=4, stacked=True)


def run_route(expert: Tensor, plan: Plan) -> Routing:
    """expert [T, top_k] -> pairs in expert order, in blocks that suit the plan."""
    if plan.config is None:
        return empty_routing(expert, plan.experts)
    return launch_route(expert, plan.experts, plan.config.tokens, plan.chip.routing_pdl)


def run_up(
    x: Tensor, expert: Tensor, routing: Routing, plan: Plan, up: Matrix, gated: bool, activation: str,
    next_down: Matrix | None = None,
) -> Tensor | Activations:  # fmt: skip
    """x [T, I] -> activation(gate) * up [T * top_k, M] where gated, else activation(W x). If `next_down` is what comes
    next, maybe in the form that it multiplies."""
    w, chip, config, top_k, pdl, form = up.weight, plan.chip, plan.config, plan.top_k, plan.pdl, plan.form(up.bits)
    if config is None:
        rows = w.out_features // 2 if gated else w.out_features
        if plan.tokens == 1 and chip.takes_single_up(form, top_k, rows, w.words.shape[2], w.groups):
            programs = 2 * chip.multiprocessors
            return single_up(
                x, w, up.bias, expert, gated, activation, up.bits, up.clip, programs, chip.single_up, pdl
            )  # fmt: skip
        q = quantize(x, w.groups, up.bits, up.clip, form, pdl)
        return decode(q, w, up.bias, expert, None, top_k, gated, activation, x.dtype, chip.decode_up[form], pdl)
    tile = config.pick_up(w.in_features)
    q = quantize(x, w.groups, up.bits, up.clip, form, pdl, "before", piece(w, tile))
    finished = (
        next_down is not None and form is plan.form(next_down.bits) is Form.FLOAT16 and not exact_a16()
        and up.bias is None and overlaps(w, tile)
        and overlaps(next_down.weight, config.pick_down(next_down.weight.in_features))
    )  # fmt: skip
    dtype, scale = (torch.float16, q.scale.new_empty(plan.pairs)) if finished else (x.dtype, None)
    y = grouped(q, w, up.bias, routing, None, top_k, gated, activation, dtype, config.tokens, tile, pdl, scale)
    return y if scale is None else Activations(y.unsqueeze(0), scale, zero=scale)


def run_down(
    hidden: Tensor | Activations, expert: Tensor, pair_weight: Tensor, routing: Routing, plan: Plan, down: Matrix,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """hidden [T * top_k, M] of `run_up`, expert and pair_weight [T, top_k] -> [T, O]."""
    w, chip, config, top_k, pdl, form = down.weight, plan.chip, plan.config, plan.top_k, plan.pdl, plan.form(down.bits)
    # What comes after a quantization reads the lists before it waits: `run_up` has waited for them.
    if config is None:
        assert isinstance(hidden, Tensor)
        if plan.tokens == 1 and chip.takes_single_down(form, w.words.shape[2], w.groups):
            single = chip.pick_single_down(w.in_features)
            return single_down(hidden, w, down.bias, expert, pair_weight, down.bits, down.clip, single, pdl)
        q = quantize(hidden, w.groups, down.bits, down.clip, form, pdl, "after")
        config_down = chip.pick_decode_down(plan.tokens, top_k)
        return decode(q, w, down.bias, expert, pair_weight, top_k, False, "none", dtype, config_down, pdl)
    tile = config.pick_down(w.in_features)
    if isinstance(hidden, Activations):
        q = hidden
    else:
        q = quantize(hidden, w.groups, down.bits, down.clip, form, pdl, "after", piece(w, tile))
    y = grouped(q, w, down.bias, routing, pair_weight, top_k, False, "none", dtype, config.tokens, tile, pdl)
    return combine(y, expert, plan.experts, top_k, dtype, pdl)


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
    if tokens <= DECODED_TOKENS:
        form = decode_form(activation_bits)
        q = quantize(x, w.groups, activation_bits, clip, form, pdl, "after")
        return decode(q, w, bias, None, None, 1, False, "none", x.dtype, chip.decode_linear[form], pdl)
    form = chip.form(activation_bits, 0)
    config = chip.pick_linear(form, tokens * w.out_features)
    q = quantize(x, w.groups, activation_bits, clip, form, pdl, "after", piece(w, config.tile))
    return grouped(q, w, bias, None, None, 1, False, "none", x.dtype, config.tokens, config.tile, pdl)


@linear.register_fake
def _(x, weight, in_features, bias, activation_bits, clip):
    return x.new_empty(x.shape[0], weight[0].shape[1])


@torch.library.custom_op("codequant::triton_experts", mutates_args=())
def experts(
    x: Tensor,
    expert: Tensor,
    pair_weight: Tensor,
    up: list[Tensor],
    in_features: int,
    up_bias: Tensor | None,
    up_bits: int,
    up_clip: float,
    gated: bool,
    activation: str,
    down: list[Tensor],
    intermediate: int,
    down_bias: Tensor | None,
    down_bits: int,
    down_clip: float,
) -> Tensor:
    """x [T, I], expert and pair_weight [T, top_k] -> [T, O] in x's dtype: all of a feed-forward."""
    x, expert, pair_weight = x.contiguous(), expert.contiguous(), pair_weight.contiguous()
    first = Matrix(_weight(up, in_features), up_bias, up_bits, up_clip)
    second = Matrix(_weight(down, intermediate), down_bias, down_bits, down_clip)
    plan = make_plan(expert, len(up[0]), max(up_bits, down_bits))
    routing = run_route(expert, plan)
    hidden = run_up(x, expert, routing, plan, first, gated, activation, next_down=second)
    return run_down(hidden, expert, pair_weight, routing, plan, second, x.dtype)


@experts.register_fake
def _(
    x, expert, pair_weight, up, in_features, up_bias, up_bits, up_clip, gated, activation, down, intermediate,
    down_bias, down_bits, down_clip,
):  # fmt: skip
    return x.new_empty(expert.shape[0], down[0].shape[1])


@torch.library.custom_op("codequant::triton_route", mutates_args=())
def route(expert: Tensor, experts: int, layer_bits: int) -> list[Tensor]:
    """expert [T, top_k] -> the tensors of a Routing."""
    return run_route(expert.contiguous(), make_plan(expert, experts, layer_bits)).tensors


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
    bits: int,
    clip: float,
    gated: bool,
    activation: str,
    layer_bits: int,
) -> Tensor:
    """x [T, I], expert [T, top_k] -> activation(gate) * up [T * top_k, M] where gated, else activation(W x)."""
    up = Matrix(_weight(weight, in_features), bias, bits, clip)
    plan = make_plan(expert, len(weight[0]), layer_bits)
    hidden = run_up(x.contiguous(), expert.contiguous(), Routing(*routing), plan, up, gated, activation)
    assert isinstance(hidden, Tensor)
    return hidden


@expert_up.register_fake
def _(x, expert, routing, weight, in_features, bias, bits, clip, gated, activation, layer_bits):
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
    bits: int,
    clip: float,
    layer_bits: int,
) -> Tensor:
    """hidden [T * top_k, M] of `expert_up`, expert and pair_weight [T, top_k] -> [T, O] in hidden's dtype."""
    down = Matrix(_weight(weight, in_features), bias, bits, clip)
    plan = make_plan(expert, len(weight[0]), layer_bits)
    return run_down(
        hidden.contiguous(), expert.contiguous(), pair_weight.contiguous(), Routing(*routing), plan, down, hidden.dtype
    )


@expert_down.register_fake
def _(hidden, expert, pair_weight, routing, weight, in_features, bias, bits, clip, layer_bits):
    return hidden.new_empty(expert.shape[0], weight[0].shape[1])
