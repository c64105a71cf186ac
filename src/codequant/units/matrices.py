"""Quantize folded matrices and name their tensors; read them back as the runtime will."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.hadamard import hadamard_transform
from codequant.packing import SUFFIXES, PackedWeight, pack, unpack
from codequant.permutation import move_rows
from codequant.quantization_config import Scheme
from codequant.units.context import Context
from codequant.units.moments import Moments, as_read
from codequant.weight_quantization import QuantizedWeight, WeightOptions, quantize_weight, target_weight
from codequant.working_layer import WorkingLayer


def quantize(context: Context, scheme: Scheme, weight: Tensor, moments: Moments) -> QuantizedWeight:
    """Quantize a stack of folded matrices [B, O, I] on the moments of their inputs ([I, I] or [B, I, I])."""
    w = context.recipe.weights
    if scheme.hadamard:
        weight = hadamard_transform(weight)
    options = WeightOptions(
        bits=scheme.bits,
        group_size=scheme.group_size,
        method=w.method,
        rounds=w.rounds,
        sweeps=w.sweeps,
        damp=w.damping,
    )
    target = None
    if w.method == "hessian" and w.correction > 0:
        target = target_weight(weight, moments.hessian, moments.cross, w.correction, w.damping)
    return quantize_weight(weight, moments.hessian, target, options, threads=1)


def quantize_each(
    context: Context, scheme: Scheme, weight: Tensor, moments: Moments, bits: Sequence[int]
) -> QuantizedWeight:
    """`quantize` with each matrix at its own bits. All codebooks have room for the most: a narrower one ends in zeros
    that no index reaches."""
    widths = sorted(set(bits))
    if len(widths) == 1:
        return quantize(context, replace(scheme, bits=widths[0]), weight, moments)
    runs = [[b for b, own in enumerate(bits) if own == width] for width in widths]
    found = [
        quantize(context, replace(scheme, bits=width), weight[run], moments.of(run)) for width, run in zip(widths, runs)
    ]
    back = torch.tensor([b for run in runs for b in run], device=weight.device).argsort()
    room = found[-1].codebook.shape[-1]
    return QuantizedWeight(
        torch.cat([q.indices for q in found])[back],
        torch.cat([F.pad(q.codebook, (0, room - q.codebook.shape[-1])) for q in found])[back],
        torch.cat([q.step for q in found])[back],
        torch.cat([q.error for q in found])[back],
    )


def split_rows(quantized: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    """Runs of rows; the error stays that of the whole."""
    parts = zip(*(t.split(rows, dim=1) for t in (quantized.indices, quantized.codebook, quantized.step)))
    return [QuantizedWeight(indices, codebook, step, quantized.error) for indices, codebook, step in parts]


def reorder_rows(quantized: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """Output channels in the order int64 [B, O]: codebooks belong to rows and move with them."""
    indices, codebook, step = (move_rows(t, order) for t in (quantized.indices, quantized.codebook, quantized.step))
    return QuantizedWeight(indices, codebook, step, quantized.error)


def packed_one(quantized: QuantizedWeight, index: int, bits: int) -> PackedWeight:
    """One matrix of a stack whose codebooks may have more room than its bits need."""
    return pack(quantized.indices[index], quantized.codebook[index, ..., : 2**bits], quantized.step[index])


def packed_tensors(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors of the format that stand for the checkpoint tensor `name`."""
    return {f"{name}_{suffix}": getattr(weight, suffix).cpu() for suffix in SUFFIXES}


def read_packed(context: Context, key: str, module: str, in_features: int) -> PackedWeight:
    names = [f"{module}.weight_{suffix}" for suffix in SUFFIXES]
    saved = context.store.read(key, *names)
    packed, codebook, step = (saved[name].to(context.device) for name in names)
    return PackedWeight(packed, codebook, step, in_features)


def plain_tensors(context: Context, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The folded tensors that are not quantized, by checkpoint name, as the output stores them."""
    return {name: stored(context, name, tensors[path]) for path, name in plain_names(context, layer, tensors).items()}


def local_tensors(context: Context, layer: int, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """`plain_tensors` under their paths in the layer, ready to compute with."""
    prefix = f"{context.source.layer_names[layer]}."
    paths = {e.name: p.removeprefix(prefix) for p, (e, *_) in context.source.sources.items() if p.startswith(prefix)}
    return {paths[name]: t.to(context.device, torch.float32) for name, t in plain.items()}


def plain_names(context: Context, layer: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Path in the layer -> checkpoint name, of the tensors that are not quantized."""
    quantized = {
        f"{reader}.weight"
        for site in context.source.structures[layer].sites
        for reader in site.readers
        if context.scheme(layer, reader) is not None
    }
    prefix = context.source.layer_names[layer]
    return {path: context.source.sources[f"{prefix}.{path}"][0].name for path in tensors if path not in quantized}


def stored(context: Context, name: str, tensor: Tensor) -> Tensor:
    """An unquantized tensor as the output stores it: in the source's own precision."""
    return (tensor.to(context.source.checkpoint.dtype(name)) if tensor.is_floating_point() else tensor).cpu()


def finished_dense(context: Context, layer: int, key: str) -> WorkingLayer:
    """The student's layer, its experts apart, with every tensor as `key` stores it."""
    source, structure = context.source, context.source.structures[layer]
    shapes = source.layers[layer].state_dict()
    own = [p for p in shapes if structure.experts is None or not p.startswith(f"{structure.experts.path}.")]
    plain = context.store.read(key, *plain_names(context, layer, {p: shapes[p] for p in own}).values())
    working = context.working_layer(layer, local_tensors(context, layer, plain))
    for site in structure.sites:
        for reader in site.readers:
            if (scheme := context.scheme(layer, reader)) is not None:
                in_features = shapes[f"{reader}.weight"].shape[1]
                packed = read_packed(context, key, context.module_name(layer, reader), in_features)
                working.replace(reader, unpack(packed), partial(as_read, scheme=scheme))
    return working
