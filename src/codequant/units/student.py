"""The quantized model: a layer's final tensors, and the layer run from them."""

import torch
from torch import Tensor

from codequant.folding import rotate_rows
from codequant.packing import unpack
from codequant.units.context import Context, Result, dense_key, experts_key, layer_key
from codequant.units.experts import entries_of
from codequant.units.matrices import finished_dense, read_packed
from codequant.units.moments import as_read
from codequant.units.teacher import experts_of


def layer(context: Context, layer: int) -> Result:
    """All tensors of a finished layer: one shard of the output."""
    keys = [dense_key(layer), *(experts_key(layer, s) for s in range(len(context.expert_shards(layer))))]
    merged: dict[str, Tensor] = {}
    for key in keys:
        merged |= context.store.read(key)
    return {name: tensor for name, tensor in sorted(merged.items()) if not name.startswith("moments.")}, {}


def student(context: Context, layer: int, shard: int) -> Result:
    """One layer of the quantized model on one shard of windows, from its final tensors."""
    source, key = context.source, layer_key(layer)
    working = finished_dense(context, layer, key)
    run = None
    if (structure := source.structures[layer].experts) is not None:
        outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
        names = dict(zip(("gate_up", "down"), (name for name, _ in source.expert_matrices(layer))))
        widths = {"gate_up": source.hidden_size, "down": structure.intermediate}

        def read(expert: int) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for which, parameter in names.items():
                scheme = outer if which == "gate_up" else inner
                entries = [entry for entry, *_ in entries_of(context, parameter, slice(expert, expert + 1))]
                if scheme is None:
                    parts = [context.store.read_one(key, e.name).float() for e in entries]
                else:
                    parts = [unpack(read_packed(context, key, e.module, widths[which])) for e in entries]
                tensors[which] = torch.cat(parts)[None].to(context.device)
                if structure.has_bias:
                    biases = [
                        entry for entry, *_ in entries_of(context, f"{parameter}_bias", slice(expert, expert + 1))
                    ]
                    saved = [context.store.read_one(key, e.name).float() for e in biases]
                    tensors[f"{which}_bias"] = torch.cat(saved)[None].to(context.device)
            return tensors

        quantized = experts_of(context, layer, read, inner)

        def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return quantized(as_read(x, outer), top_k_index, top_k_weights)

    hidden = working.run(context.hidden("student", layer, shard), run)
    return {"hidden": hidden.cpu()}, {"difference": difference(context, layer, shard, hidden)}


def difference(context: Context, layer: int, shard: int, hidden: Tensor) -> float:
    """Relative distance of the quantized model's hidden states from the source's, after this layer."""
    source = rotate_rows(context.hidden("teacher", layer + 1, shard), context.rotation)
    return float((hidden - source).norm() / source.norm())
