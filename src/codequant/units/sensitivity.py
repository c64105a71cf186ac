"""What every expert's matrices cost the model at 2, 3 and 4 bits, and the bits that each gets of a given average.

The cost of a matrix is the error that it brings into the residual stream, relative to the stream:

    relative error of the matrix at b bits, under its inputs   sum_o (q_o - w_o) D (q_o - w_o)^T / sum_o w_o D w_o^T
    times the expert's share of the stream                     sum_t (g_t |y_t|)^2 / sum_t |h_t|^2

with D the diagonal of E[x x^T] over the tokens routed to the expert, g_t its routing weight, y_t its output and h_t the
layer's output. Frequency of routing is part of the second factor. Everything is measured on the source model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.allocation import allocate
from codequant.clustering import kmeans
from codequant.folding import rotate_rows
from codequant.hadamard import hadamard_transform
from codequant.packing import BITS, groups_per_row
from codequant.quantization_config import Scheme
from codequant.units.context import Context, Result, bits_name, sensitivity_key
from codequant.units.teacher import only, pairs_by_expert, read_experts

ROWS = 64  # of a matrix, evenly spaced: what its error is estimated from


def sensitivity(context: Context, layer: int) -> Result:
    """Costs float64 [E, 2, len(BITS)] of gate_up and down, by expert of a layer."""
    structure = context.experts_by_layer[layer]
    E, H, M = structure.num_experts, context.source.hidden_size, structure.intermediate
    outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
    gain, apply_gate = context.experts_gain(layer), context.apply_gate(layer)
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    importance = [torch.zeros(E, I, device=context.device) for I in (H, M)]
    energy, total = torch.zeros(E, dtype=torch.float64, device=context.device), 0.0
    for shard in range(context.window_shards):
        routed = teacher_layer.routed(context.hidden("teacher", layer, shard))
        rotated = rotate_rows(routed.x, context.experts_basis(layer))
        for e, (token, slot) in enumerate(pairs_by_expert(routed.top_k_index, 0, E)):
            if not len(token):
                continue
            t = read_experts(context, layer, slice(e, e + 1), gain, None)
            share = routed.top_k_weights[token, slot, None].float()
            hidden = apply_gate(F.linear(routed.x[token], t["gate_up"][0], only(t.get("gate_up_bias"))))
            output = F.linear(hidden, t["down"][0], only(t.get("down_bias")))
            read = hadamard_transform(hidden) if inner is not None and inner.hadamard else hidden
            importance[0][e] += rotated[token].square().sum(0)
            importance[1][e] += (read * share).square().sum(0)
            energy[e] += (output * share).double().square().sum()
        total += float(context.hidden("teacher", layer + 1, shard).double().square().sum())
    energy = energy.cpu()
    costs = torch.zeros(E, 2, len(BITS), dtype=torch.float64)
    for e in energy.nonzero().flatten().tolist():
        own = read_experts(context, layer, slice(e, e + 1), gain, context.rotation)
        for k, (name, scheme) in enumerate((("gate_up", outer), ("down", inner))):
            if scheme is not None:
                costs[e, k] = relative_errors(own[name][0], importance[k][e], scheme) * energy[e] / total
    return {"costs": costs}, {}


def relative_errors(weight: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """float64 [len(BITS)] of a matrix [O, I] under inputs of second moments diag(importance [I]), from a few rows."""
    if scheme.hadamard:
        weight = hadamard_transform(weight)
    rows = weight[:: max(1, len(weight) // ROWS)]
    columns = rows.shape[1] // groups_per_row(rows.shape[1], scheme.group_size)
    values = rows.reshape(-1, columns)
    weights = importance.expand_as(rows).reshape(-1, columns)
    errors = []
    for bits in BITS:
        centroids, indices = kmeans(values, weights, 2**bits, threads=1)
        errors.append((weights * (values - centroids.gather(-1, indices.long())).square()).sum())
    return (torch.stack(errors) / (weights * values.square()).sum()).double().cpu()


def allocation(context: Context) -> Result:
    """Bits uint8 [E, 2] of gate_up and down of every layer with experts: the average over all quantized matrices is
    the recipe's target, where those outside the experts have `weights.bits`. A tensor that holds several experts has
    one width for all."""
    target = context.recipe.weights.target_bits
    assert target is not None
    candidates: list[tuple[int, int, list[int]]] = []  # layer, gate_up or down, experts
    sizes: list[int] = []
    costs: list[Tensor] = []
    for layer in context.experts_by_layer:
        found = context.store.read_one(sensitivity_key(layer), "costs")
        for k, (parameter, _) in enumerate(context.source.expert_matrices(layer)):
            if context.experts_scheme(layer, inner=bool(k)) is None:
                continue
            experts = range(len(found))
            is_fused = not context.source.sources[parameter][0].index
            for group in [list(experts)] if is_fused else [[e] for e in experts]:
                candidates.append((layer, k, group))
                sizes.append(len(group) * context.expert_size(layer)[k])
                costs.append(found[group, k].sum(0))
    in_experts, others = context.quantized_weights()
    spent_on_others = context.recipe.weights.bits * others
    bits = allocate(sizes, torch.stack(costs), target * (in_experts + others) - spent_on_others)
    result = {
        bits_name(layer): torch.full((structure.num_experts, 2), BITS[-1])
        for layer, structure in context.experts_by_layer.items()
    }
    for (layer, k, group), width in zip(candidates, bits):
        result[bits_name(layer)][group, k] = width
    spent = spent_on_others + sum(size * width for size, width in zip(sizes, bits))
    info: dict[str, Any] = {
        "target": target,
        "average": spent / (in_experts + others),
        "weights": {str(b): sum(size for size, width in zip(sizes, bits) if width == b) for b in BITS},
    }
    return {name: tensor.to(torch.uint8) for name, tensor in result.items()}, info
