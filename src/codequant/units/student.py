"""The quantized model: a layer's final tensors, and the layer run from them."""

from torch import Tensor

from codequant.folding import rotate_rows
from codequant.units.context import Context, Result, dense_key, experts_key, layer_key, to_device
from codequant.units.expert_tensors import join, read_expert
from codequant.units.matrices import finished_dense
from codequant.units.moments import as_read
from codequant.units.teacher import experts_of


def layer(context: Context, layer: int) -> Result:
    """All tensors of a finished layer: one shard of the output."""
    runs = [context.store.read(experts_key(layer, s)) for s in range(len(context.expert_shards(layer)))]
    merged = context.store.read(dense_key(layer)) | join(runs)
    return {name: tensor for name, tensor in sorted(merged.items()) if not name.startswith("moments.")}, {}


def student(context: Context, layer: int, shard: int) -> Result:
    """One layer of the quantized model on one shard of windows, from its final tensors."""
    source, key = context.source, layer_key(layer)
    working = finished_dense(context, layer, key)
    run = None
    if (structure := source.structures[layer].experts) is not None:
        outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
        (first, _), (down, _) = source.expert_matrices(layer)
        matrices = {
            "gate_up": (first, source.hidden_size if outer is not None else None),
            "down": (down, structure.intermediate if inner is not None else None),
        }
        if structure.has_bias:
            matrices |= {"gate_up_bias": (f"{first}_bias", None), "down_bias": (f"{down}_bias", None)}

        saved = to_device(context.store.map(key), context.device)

        def read(expert: int) -> dict[str, Tensor]:
            return {
                which: read_expert(context, layer, saved, parameter, expert, width)
                for which, (parameter, width) in matrices.items()
            }

        quantized = experts_of(context, layer, read, inner)

        def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return quantized(as_read(x, outer), top_k_index, top_k_weights)

    hidden = working.run(context.hidden("student", layer, shard), run)
    return {"hidden": hidden.cpu()}, {"difference": difference(context, layer, shard, hidden)}


def difference(context: Context, layer: int, shard: int, hidden: Tensor) -> float:
    """Relative distance of the quantized model's hidden states from the source's, after this layer."""
    source = rotate_rows(context.hidden("teacher", layer + 1, shard), context.rotation)
    return float((hidden - source).norm() / source.norm())
