"""Quantize a layer's experts, a shard at a time, on the tokens that the quantized model routes to them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.folding import rotate_rows
from codequant.hadamard import hadamard_transform
from codequant.permutation import group_order, move_columns, move_rows
from codequant.quantization_config import Scheme
from codequant.units.context import Context, Result, dense_key, to_device
from codequant.units.expert_tensors import packed_experts, places, plain_experts
from codequant.units.matrices import finished_dense, quantize_each, reorder_rows
from codequant.units.moments import Moments, Sums, as_read, mixed, stack
from codequant.units.teacher import pairs_by_expert, read_experts
from codequant.units.tuning import tune_experts
from codequant.weight_quantization import QuantizedWeight


def route(context: Context, layer: int, shard: int) -> Result:
    """What the experts are handed on one shard of windows, by the student's own routing, and by the teacher's input."""
    student_layer = finished_dense(context, layer, dense_key(layer))
    routed = student_layer.routed(context.hidden("student", layer, shard))
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    source = teacher_layer.routed(context.hidden("teacher", layer, shard)).x
    return {
        "x": routed.x.cpu(),
        "source_x": rotate_rows(source, context.experts_basis(layer)).cpu(),
        "top_k_index": routed.top_k_index.to(torch.int32).cpu(),
        "top_k_weights": routed.top_k_weights.float().cpu(),
    }, {}


def experts(context: Context, layer: int, start: int, stop: int) -> Result:
    """Quantize experts start..stop: gate and up on their routed tokens, then down on what those hand on. Their
    centroids are then fine-tuned together, where the recipe says so.

    An expert that sees fewer than `min_expert_tokens` is calibrated with the tokens of the whole layer.
    """
    structure = context.experts_by_layer[layer]
    chosen, count = slice(start, stop), stop - start
    own = read_experts(context, layer, chosen, context.experts_gain(layer), context.rotation)
    outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
    first, second = (name for name, _ in context.source.expert_matrices(layer))
    found: dict[str, QuantizedWeight] = {}
    bits = dict(zip(("gate_up", "down"), zip(*context.expert_bits(layer, chosen))))

    sums = input_sums(context, layer, start, count, outer)
    starved = {e for e in range(count) if sums[e].tokens < context.recipe.weights.min_expert_tokens}
    if outer is not None:
        everything = all_token_moments(context, layer)
        share = context.recipe.weights.all_tokens
        moments = stack(
            [everything if e in starved else mixed(s.mean(), everything, share) for e, s in enumerate(sums)]
        )
        found["gate_up"] = quantize_each(context, outer, own["gate_up"], moments, bits["gate_up"])
        del everything, moments
    tokens = [s.tokens for s in sums]
    del sums
    if inner is not None:
        gate_up = found["gate_up"].dequantized() if outer is not None else own["gate_up"]
        moments = stack([s.mean() for s in intermediate_sums(context, layer, start, own, gate_up, starved)])
        if context.permutes_experts(layer):
            diagonal = moments.hessian.diagonal(dim1=-2, dim2=-1)
            order = group_order(own["down"], diagonal, inner.group_size, inner.bits, threads=1)  # [n, M]
            own["down"], moments = move_columns(own["down"], order), moments.moved(order)
            move_intermediate(own, found, torch.cat((order, order + structure.intermediate), dim=-1))
        found["down"] = quantize_each(context, inner, own["down"], moments, bits["down"])
    info: dict[str, Any] = {"tokens": {start + e: n for e, n in enumerate(tokens)}, "errors": {}}
    info["starved"] = sorted(start + e for e in starved)
    if context.recipe.finetuning.epochs and found:
        info["finetuning"] = tune_experts(context, layer, start, own, found, starved)

    result: dict[str, Tensor] = {}
    for name, key in ((first, "gate_up"), (second, "down")):
        if key in found:
            result |= packed_experts(context, layer, name, chosen, found[key], bits[key])
            info["errors"] |= errors_of(context, name, chosen, found[key])
        else:
            result |= plain_experts(context, layer, name, chosen, own[key])
        if f"{key}_bias" in own:
            result |= plain_experts(context, layer, f"{name}_bias", chosen, own[f"{key}_bias"])
    return result, info


def all_token_moments(context: Context, layer: int) -> Moments:
    """Moments of what the layer's experts are handed, over all tokens."""
    saved = context.store.read(dense_key(layer), "moments.hessian", "moments.cross")
    return Moments(*(saved[f"moments.{k}"].to(context.device) for k in ("hessian", "cross")))


def input_sums(context: Context, layer: int, start: int, count: int, scheme: Scheme | None) -> list[Sums]:
    """What each of `count` experts from `start` on reads, over the tokens that are routed to it."""
    sums = [Sums.zeros(context.source.hidden_size, context.device) for _ in range(count)]
    for batch in routed_batches(context, layer):
        for e, (token, _) in enumerate(pairs_by_expert(batch["top_k_index"], start, count)):
            sums[e].add(as_read(batch["x"][token], scheme), batch["source_x"][token])
    return sums


def routed_batches(context: Context, layer: int) -> Iterator[dict[str, Tensor]]:
    """The results of `route` on the device, which picks tokens faster than it could be sent them; on a CPU they stay
    mapped, and only what is picked is read."""
    return (to_device(batch, context.device) for batch in context.routed_batches(layer))


def intermediate_sums(
    context: Context, layer: int, start: int, own: dict[str, Tensor], gate_up: Tensor, starved: set[int]
) -> list[Sums]:
    """What down reads in each expert, weighted by routing weights: from the quantized gate_up [n, 2M, H] on the
    student's tokens, and from the source's own on the source's."""
    outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
    assert inner is not None
    apply_gate, bias = context.apply_gate(layer), own.get("gate_up_bias")
    count, intermediate = len(gate_up), own["down"].shape[-1]
    sums = [Sums.zeros(intermediate, context.device) for _ in range(count)]
    for shard, batch in enumerate(routed_batches(context, layer)):
        for e, (token, slot) in enumerate(pairs_by_expert(batch["top_k_index"], start, count)):
            share: Tensor | None = batch["top_k_weights"][token, slot, None]
            if e in starved:
                if shard > 0:  # one shard of windows is plenty for an expert that hardly any token reaches
                    continue
                token, share = torch.arange(len(batch["x"]), device=context.device), None
            row_bias = None if bias is None else bias[e]
            x, source_x = batch["x"][token], batch["source_x"][token]
            hidden = apply_gate(F.linear(as_read(x, outer), gate_up[e], row_bias))
            wanted = apply_gate(F.linear(source_x, own["gate_up"][e], row_bias))
            sums[e].add(as_read(hidden, inner), hadamard_transform(wanted) if inner.hadamard else wanted, share)
    return sums


def move_intermediate(own: dict[str, Tensor], found: dict[str, QuantizedWeight], order: Tensor) -> None:
    """Let the rows of gate and up follow down's columns: order int64 [n, 2M]. Rows are quantized one by one, so it
    makes no difference that this comes after."""
    order = order[:, : own["gate_up"].shape[1]]  # [n, M] where there is no gate
    if "gate_up" in found:
        found["gate_up"] = reorder_rows(found["gate_up"], order)
    for key in ("gate_up", "gate_up_bias"):
        if key in own:
            own[key] = move_rows(own[key], order)


def errors_of(context: Context, parameter: str, chosen: slice, quantized: QuantizedWeight) -> dict[str, float]:
    """Relative error of every expert's matrix: by checkpoint module, or module.expert where experts share a tensor."""
    found: dict[str, float] = {}
    for entry, index in places(context, parameter, chosen):
        if index:
            found[entry.module] = float(quantized.error[index[0]])
        else:
            found |= {f"{entry.module}.{chosen.start + e}": float(x) for e, x in enumerate(quantized.error)}
    return found
