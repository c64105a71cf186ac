"""Experts between their canonical layout (rows are output channels, gate before up) and the checkpoint's tensors.

Most checkpoints name one tensor per expert and projection; some keep a layer's experts in one (GPT-OSS, with gate and
up rows in turn and matrices transposed). Of the latter, a shard of experts holds a run; `join` puts the runs together.
Packed tensors are never transposed: their rows are output channels whatever the checkpoint does.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from codequant.checkpoint_names import Source as TensorSource
from codequant.packing import SUFFIXES, PackedWeight, unpack
from codequant.units.context import Context
from codequant.units.matrices import packed_one, packed_tensors, stored
from codequant.weight_quantization import QuantizedWeight


def packed_experts(
    context: Context, layer: int, parameter: str, chosen: slice, quantized: QuantizedWeight, bits: Sequence[int]
) -> dict[str, Tensor]:
    """A run of experts' packed matrices, each at its own bits, by checkpoint name. Those of one tensor share theirs."""
    weights = [packed_one(quantized, e, width) for e, width in enumerate(bits)]
    tensors: dict[str, Tensor] = {}
    for entry, index in places(context, parameter, chosen):
        own = weights[index[0] : index[0] + 1] if index else weights
        packed, codebook, step = (
            _to_checkpoint(context, layer, parameter, torch.stack([getattr(w, s) for w in own]))[
                (0, *index[1:]) if index else ()
            ]
            for s in SUFFIXES
        )
        tensors |= packed_tensors(entry.name, PackedWeight(packed, codebook, step, own[0].in_features))
    return tensors


def plain_experts(context: Context, layer: int, parameter: str, chosen: slice, tensor: Tensor) -> dict[str, Tensor]:
    """A run of experts' unquantized matrices [n, O, I] or biases [n, O] by checkpoint name."""
    tensor = _to_checkpoint(context, layer, parameter, tensor)
    if tensor.ndim == 3 and context.experts_by_layer[layer].is_transposed:
        tensor = tensor.transpose(1, 2)
    return {e.name: stored(context, e.name, tensor[index]) for e, index in places(context, parameter, chosen)}


def read_expert(
    context: Context, layer: int, saved: dict[str, Tensor], parameter: str, expert: int, in_features: int | None
) -> Tensor:
    """One expert's matrix [1, O, I] (bias [1, O]) in float32 from a finished layer's tensors; in_features: where it is
    packed."""
    rows: list[Tensor] = []
    for entry, _ in places(context, parameter, slice(expert, expert + 1)):
        index = None if entry.index else slice(expert, expert + 1)  # of a tensor that is the expert's own, or all's
        if in_features is None:
            part = saved[entry.name][index].float()
        else:
            packed, codebook, step = (saved[f"{entry.name}_{suffix}"][index] for suffix in SUFFIXES)
            part = unpack(PackedWeight(packed, codebook, step, in_features))
        rows.append(part)
    tensor = torch.cat(rows, dim=1)
    if in_features is None and tensor.ndim == 3 and context.experts_by_layer[layer].is_transposed:
        tensor = tensor.transpose(1, 2)
    if _interleaves(context, layer, parameter):
        tensor = torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)
    return tensor


def join(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several shards of experts together: one that occurs in all of them is a fused one."""
    joined: dict[str, list[Tensor]] = {}
    for run in runs:
        for name, tensor in run.items():
            joined.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}


def places(context: Context, parameter: str, chosen: slice) -> Iterator[tuple[TensorSource, tuple]]:
    """The checkpoint tensors that hold a run of experts, and where each lies in that run's [n, O, ...]."""
    for entry in context.source.sources[parameter]:
        if not entry.index:
            yield entry, ()
        elif chosen.start <= (expert := int(entry.index[0])) < chosen.stop:  # type: ignore[arg-type]
            yield entry, (expert - chosen.start, *entry.index[1:])


def _to_checkpoint(context: Context, layer: int, parameter: str, tensor: Tensor) -> Tensor:
    if not _interleaves(context, layer, parameter):
        return tensor
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


def _interleaves(context: Context, layer: int, parameter: str) -> bool:
    flags = context.experts_by_layer[layer]
    return flags.has_gate and not flags.is_concatenated and "gate_up_proj" in parameter
