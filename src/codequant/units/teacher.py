"""The source model, run once, layer by layer: hidden states to compare with, and samples for the rotation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.folding import fold_experts
from codequant.quantization_config import Scheme
from codequant.units.context import Context, Result
from codequant.units.moments import as_read
from codequant.working_layer import Experts


def embed(context: Context, shard: int) -> Result:
    source, ids = context.source, context.windows(shard)
    (entry,) = source.sources[f"{source.embedding_name}.weight"]
    embedded = F.embedding(ids, source.checkpoint.read(entry.name)).float()
    return {"hidden": source.first_hidden_states(embedded)}, {}


def teacher(context: Context, layer: int, shard: int) -> Result:
    """One layer of the source model on one shard of windows, and samples of the normed residual for the rotation."""
    structure = context.source.structures[layer]
    working = context.working_layer(layer, context.folded_tensors(layer, None))
    x = context.hidden("teacher", layer, shard)
    with working.observing([norm.path for norm in structure.norms]) as normed:
        hidden = working.run(x, source_experts(context, layer, None))
    tensors = {"hidden": hidden.cpu()}
    sites = sum(len(s.norms) for s in context.source.structures)
    count = max(1, context.recipe.rotation.samples // (sites * context.window_shards)) if context.rotates else 0
    seed = context.recipe.rotation.seed + layer * context.window_shards + shard
    for k, norm in enumerate(structure.norms if count else ()):
        rows = normed[norm.path].flatten(0, -2)
        picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        tensors[f"samples.{k}"] = rows[picked.to(rows.device)].half().cpu()
    return tensors, {}


def source_experts(context: Context, layer: int, rotation: Tensor | None) -> Experts | None:
    """The source's experts in the given basis, one at a time: read, fold, multiply, forget."""
    if context.source.structures[layer].experts is None:
        return None
    gain = context.experts_gain(layer)
    return experts_of(context, layer, lambda e: read_experts(context, layer, slice(e, e + 1), gain, rotation))


def experts_of(
    context: Context, layer: int, read: Callable[[int], dict[str, Tensor]], inner: Scheme | None = None
) -> Experts:
    """Experts whose weights come from `read(expert)`, a stack of one; inner: how down reads the intermediate."""
    apply_gate, count = context.apply_gate(layer), context.experts_by_layer[layer].num_experts

    def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, (token, slot) in enumerate(pairs_by_expert(top_k_index, 0, count)):
            if not len(token):
                continue
            t = read(expert)
            hidden = apply_gate(F.linear(x[token], t["gate_up"][0], only(t.get("gate_up_bias"))))
            out = F.linear(as_read(hidden, inner), t["down"][0], only(t.get("down_bias")))
            y.index_add_(0, token, out * top_k_weights[token, slot, None].to(out.dtype))
        return y

    return run


def pairs_by_expert(top_k_index: Tensor, start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """(token, slot) of the pairs that top_k_index [N, k] sends to each of `count` experts from `start` on, by token."""
    token, slot = ((top_k_index >= start) & (top_k_index < start + count)).nonzero(as_tuple=True)
    expert = top_k_index[token, slot] - start
    order = expert.argsort(stable=True)
    sizes = expert.bincount(minlength=count).tolist()
    return list(zip(token[order].split(sizes), slot[order].split(sizes)))


def only(stack: Tensor | None) -> Tensor | None:
    return None if stack is None else stack[0]


def read_experts(
    context: Context, layer: int, experts: slice, gain: Tensor | None, rotation: Tensor | None
) -> dict[str, Tensor]:
    """A run of experts in canonical layout and float32, folded."""
    stored = context.source.expert_tensors(layer, experts, None)  # half of the bytes on their way to a GPU
    t = {k: v.to(context.device).float() for k, v in stored.items()}
    t["gate_up"], t["down"], bias = fold_experts(t["gate_up"], t["down"], t.get("down_bias"), gain, rotation)
    if bias is not None:
        t["down_bias"] = bias
    return t
