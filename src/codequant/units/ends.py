"""The rotation, and the two ends of the model in its basis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant import rotation as rotations
from codequant.discovery import describe_norm
from codequant.folding import fold_norm, fold_reader, gain_of, rotate_rows
from codequant.hadamard import hadamard_matrix
from codequant.units import outliers
from codequant.units.context import Context, Result, hidden_key

ROWS = 8192  # of a vocabulary's matrix at a time


def learn_rotation(context: Context) -> Result:
    """R from the cached activations of all layers; centered norms confine it to rotations that keep the ones vector."""
    recipe, source = context.recipe.rotation, context.source
    sites = [(layer, k) for layer, structure in enumerate(source.structures) for k in range(len(structure.norms))]
    samples = read_samples(context, sites)
    by_site = samples.split([len(samples) // len(sites)] * len(sites))  # as many rows from each
    keep_ones = any(norm.centered for structure in source.structures for norm in structure.norms)
    H, direction = source.hidden_size, None
    if keep_ones:
        direction = torch.ones(H)
    elif recipe.start == "aligned":
        direction = rotations.strongest_direction(samples)
    base = rotations.random_orthogonal(H, recipe.seed) if recipe.start == "random" else hadamard_matrix(H)
    start = rotations.hadamard_start(base, direction, recipe.seed)
    loss = rotations.range_loss
    if recipe.loss == "squared-error":
        loss = partial(rotations.squared_error_loss, bits=min(8, context.recipe.activations.bits))
    fit = rotations.learn(
        samples, start, recipe.steps, recipe.learning_rate, recipe.batch, recipe.seed, loss, keep_ones=keep_ones
    )
    identity = torch.eye(H, dtype=torch.float64)
    info: dict[str, Any] = {
        "range_loss_unrotated": float(rotations.range_loss(samples[::8].float())),
        "range_loss_start": float(rotations.range_loss(samples[::8].float() @ start.float().to(samples.device))),
        "range_loss": float(rotations.range_loss(samples[::8].float() @ fit.rotation.float().to(samples.device))),
        "orthogonality_error": float((fit.rotation @ fit.rotation.T - identity).abs().max()),
    }
    rotation = fit.rotation.float()
    on_device = rotation.to(context.device)
    info["sites"] = [
        {"layer": layer, "norm": source.structures[layer].norms[k].path, **outliers.ranges(x, on_device)}
        for (layer, k), x in zip(sites, by_site)
    ]
    info["surfaces"] = outliers.spread(len(sites))
    return {"rotation": rotation, **outliers.surfaces(by_site, on_device)}, info


def read_samples(context: Context, sites: list[tuple[int, int]]) -> Tensor:
    """What `teacher` has sampled at each of the sites (layer, norm), float16 [N, H]; never twice in memory."""
    parts = [
        (hidden_key("teacher", layer + 1, shard), f"samples.{k}")
        for layer, k in sites
        for shard in range(context.window_shards)
    ]
    rows = [len(context.store.map(key)[name]) for key, name in parts]
    samples = torch.empty(sum(rows), context.source.hidden_size, dtype=torch.float16, device=context.device)
    for place, (key, name) in zip(samples.split(rows), parts):
        place.copy_(context.store.read_one(key, name))
    return samples


def ends(context: Context) -> Result:
    """Embedding, final norm and output head in the new basis, by checkpoint name. A tied head is written out."""
    source, rotation = context.source, context.rotation
    norm = describe_norm(source.norm_name, source.model.get_submodule(source.norm_name))
    prefix = f"{source.norm_name}."
    tensors = {n: source.read(n, torch.float32) for n in source.sources if n.startswith(prefix)}
    gain = gain_of(norm, tensors)
    embedding, head = f"{source.embedding_name}.weight", f"{source.head_name}.weight"
    device_gain = gain.to(context.device)

    def by_rows(parameter: str, fold: Callable[[Tensor], Tensor]) -> Tensor:
        """A fold of a vocabulary's matrix [V, H], a run of rows at a time: whole, in float32, it is gigabytes."""
        weight = source.checkpoint.read(source.sources[parameter][0].name)
        folded = torch.empty(weight.shape, dtype=source.dtype)
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            folded[rows] = fold(weight[rows].to(context.device, torch.float32))
        return folded

    tensors[head] = by_rows(embedding if source.is_tied else head, lambda w: fold_reader(w, device_gain, rotation))
    tensors[embedding] = by_rows(embedding, lambda w: rotate_rows(w, rotation))
    fold_norm(norm, tensors, None if rotation is None else rotation.cpu())
    if f"{source.head_name}.bias" in source.sources:
        tensors[f"{source.head_name}.bias"] = source.read(f"{source.head_name}.bias")
    named = {(source.sources[n][0].name if n in source.sources else n): t for n, t in tensors.items()}
    return {name: tensor.to(source.dtype) for name, tensor in named.items()}, {}


def enter(context: Context, shard: int) -> Result:
    """The student's first hidden states, from the embedding as it is stored."""
    source = context.source
    name = source.sources[f"{source.embedding_name}.weight"][0].name
    embedded = F.embedding(context.windows(shard), context.store.map("ends")[name]).float()
    return {"hidden": source.first_hidden_states(embedded)}, {}
