"""Quantize a layer's experts, a shard at a time, on the tokens that the quantized model routes to them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.folding import rotate_rows
from codequant.hadamard import hadamard_transform
from codequant.packing import pack, unpack
from codequant.units.context import Context, Result, dense_key, route_key
from codequant.units.expert_tensors import packed_experts, places, plain_experts
from codequant.units.matrices import finished_dense, quantize
from codequant.units.moments import Moments, Sums, as_read, mixed, stack
from codequant.units.teacher import read_experts
from codequant.weight_quantization import QuantizedWeight


def route(context: Context, layer: int, shard: int) -> Result:
    """What the experts are handed on one shard of windows, by the student's own routing, and by the teacher's input."""
    student_layer = finished_dense(context, layer, dense_key(layer))
    routed = student_layer.routed(context.hidden("student", layer, shard))
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    source = teacher_layer.routed(context.hidden("teacher", layer, shard)).x
    return {
        "x": routed.x.cpu(),
        "source_x": source.cpu(),
        "top_k_index": routed.top_k_index.to(torch.int32).cpu(),
        "top_k_weights": routed.top_k_weights.float().cpu(),
    }, {}


def routed_batches(context: Context, layer: int) -> Iterator[dict[str, Tensor]]:
    """The results of `route`, one shard of windows at a time."""
    for shard in range(context.window_shards):
        batch = context.store.read(route_key(layer, shard))
        yield {name: tensor.to(context.device) for name, tensor in batch.items()}


def experts(context: Context, layer: int, start: int, stop: int) -> Result:
    """Quantize experts start..stop: gate and up on their routed tokens, then down on what those hand on.

    An expert that sees fewer than `min_expert_tokens` is calibrated with the tokens of the whole layer.
    """
    source, recipe, basis = context.source, context.recipe.weights, context.experts_basis(layer)
    structure = source.structures[layer].experts
    assert structure is not None
    gain, apply_gate = context.experts_gain(layer), context.apply_gate(layer)
    chosen, count = slice(start, stop), stop - start
    own = read_experts(context, layer, chosen, gain, context.rotation)
    original = read_experts(context, layer, chosen, gain, None)["gate_up"]
    outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
    names = [name for name, _ in source.expert_matrices(layer)]
    result: dict[str, Tensor] = {}

    sums = [Sums.zeros(source.hidden_size, context.device) for _ in range(count)]
    for batch in routed_batches(context, layer):
        source_x = rotate_rows(batch["source_x"], basis)
        for e in range(count):
            token = (batch["top_k_index"] == start + e).nonzero(as_tuple=True)[0]
            sums[e].add(as_read(batch["x"][token], outer), source_x[token])
    starved = {e for e in range(count) if sums[e].tokens < recipe.min_expert_tokens}
    info: dict[str, Any] = {
        "tokens": {start + e: sums[e].tokens for e in range(count)},
        "starved": sorted(start + e for e in starved),
        "errors": {},
    }
    gate_up = own["gate_up"]
    if outer is not None:
        saved = context.store.read(dense_key(layer), "moments.hessian", "moments.cross")
        everything = Moments(*(saved[f"moments.{k}"].to(context.device) for k in ("hessian", "cross")))
        moments = stack(
            [everything if e in starved else mixed(s.mean(), everything, recipe.all_tokens) for e, s in enumerate(sums)]
        )
        quantized = quantize(context, outer, gate_up, moments)
        packed = pack(quantized.indices, quantized.codebook, quantized.step)
        result |= packed_experts(context, layer, names[0], chosen, packed)
        info["errors"] |= errors_of(context, names[0], chosen, quantized)
        gate_up = unpack(packed).to(context.device)
        del moments, everything
    else:
        result |= plain_experts(context, layer, names[0], chosen, gate_up)

    if inner is not None:
        bias = own.get("gate_up_bias")
        sums = [Sums.zeros(structure.intermediate, context.device) for _ in range(count)]
        for shard, batch in enumerate(routed_batches(context, layer)):
            for e in range(count):
                token, slot = (batch["top_k_index"] == start + e).nonzero(as_tuple=True)
                share: Tensor | None = batch["top_k_weights"][token, slot, None]
                if e in starved:
                    if shard > 0:  # one shard of windows is plenty for an expert that hardly any token reaches
                        continue
                    token, share = torch.arange(len(batch["x"]), device=context.device), None
                row_bias = None if bias is None else bias[e]
                hidden = apply_gate(F.linear(as_read(batch["x"][token], outer), gate_up[e], row_bias))
                wanted = apply_gate(F.linear(batch["source_x"][token], original[e], row_bias))
                sums[e].add(as_read(hidden, inner), hadamard_transform(wanted) if inner.hadamard else wanted, share)
        quantized = quantize(context, inner, own["down"], stack([s.mean() for s in sums]))
        packed = pack(quantized.indices, quantized.codebook, quantized.step)
        result |= packed_experts(context, layer, names[1], chosen, packed)
        info["errors"] |= errors_of(context, names[1], chosen, quantized)
    else:
        result |= plain_experts(context, layer, names[1], chosen, own["down"])
    for name, key in zip(names, ("gate_up_bias", "down_bias")):
        if key in own:
            result |= plain_experts(context, layer, f"{name}_bias", chosen, own[key])
    return result, info


def errors_of(context: Context, parameter: str, chosen: slice, quantized: QuantizedWeight) -> dict[str, float]:
    """Relative error of every expert's matrix: by checkpoint module, or module.expert where experts share a tensor."""
    found: dict[str, float] = {}
    for entry, index in places(context, parameter, chosen):
        if index:
            found[entry.module] = float(quantized.error[index[0]])
        else:
            found |= {f"{entry.module}.{chosen.start + e}": float(x) for e, x in enumerate(quantized.error)}
    return found
