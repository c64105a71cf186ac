"""Which checkpoint tensor fills which part of which model parameter.

transformers keeps a layer's experts fused ([E, 2M, H] and [E, H, M]) while most checkpoints name one tensor per expert
and projection. Its conversion mapping knows both sides but only runs inside `from_pretrained`; here the same mapping is
turned into a table, from a model skeleton on the meta device, so that a stage can read `experts.3.gate_proj.weight`
from a shard without building the model, and a loader knows every name that a folder must hold.

Letters: E experts, H hidden and M intermediate channels, P projections that share one parameter (gate and up: P = 2),
O output and I input channels of any matrix.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, PrefixChange, WeightConverter, WeightRenaming

from codequant.errors import InputError

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: `model.get_parameter(parameter)[index]` is its place in the model."""

    name: str
    parameter: str  # or persistent buffer
    shape: tuple[int, ...]
    local: str  # the tensor's name in the model's own naming: `parameter`, unless transformers merges it into that
    index: Index = ()  # () for the whole parameter; (expert, rows) inside a fused one

    @property
    def module(self) -> str:
        """Name of the checkpoint's module that holds the tensor: what quantization patterns are matched against."""
        return self.name.removesuffix(".weight")


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device: names and shapes, no memory. No remote code."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def parameter_sources(model: PreTrainedModel) -> dict[str, list[Source]]:
    """The checkpoint tensors of every parameter and persistent buffer, in the order in which they fill it.

    Tied parameters that a checkpoint does not store are left out. Raises InputError naming a parameter that
    transformers assembles in a way this table cannot express.
    """
    transforms = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    renamings = [t.reverse_transform() for t in reversed(transforms) if isinstance(t, WeightRenaming)]
    converters = [t for t in reversed(transforms) if isinstance(t, WeightConverter)]
    reversed_converters = [(t.reverse_transform(), t) for t in converters]

    def checkpoint_name(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    tied = set(model.all_tied_weights_keys)
    sources: dict[str, list[Source]] = {}
    for parameter, tensor in model.state_dict().items():
        if parameter in tied:
            continue
        for reverse, converter in reversed_converters:
            pattern, matched = reverse.rename_source_key(parameter)
            if matched is not None:
                patterns = [pattern.replace(reverse.target_patterns[0], p) for p in reverse.target_patterns]
                places = _expert_places(parameter, tuple(tensor.shape), patterns, converter.operations)
                break
        else:
            places = [(parameter, tuple(tensor.shape), ())]
        sources[parameter] = [
            Source(checkpoint_name(local), parameter, shape, local, index) for local, shape, index in places
        ]
    return sources


def by_checkpoint_name(sources: dict[str, list[Source]]) -> dict[str, Source]:
    """The inverse table: checkpoint tensor -> its place in the model."""
    return {source.name: source for entries in sources.values() for source in entries}


@dataclass(frozen=True)
class Matrix:
    """A checkpoint tensor that can be quantized: [O, I], or [E, O, I] where the checkpoint keeps experts fused."""

    source: Source
    out_features: int
    in_features: int
    experts: tuple[int, ...] = ()  # (E,) or ()
    transposed: bool = False  # the source's last two dimensions are I, O


def is_experts(module: nn.Module) -> bool:
    """Whether the module is one of those that `@use_experts_implementation` decorates."""
    return hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def matrices(model: PreTrainedModel, sources: dict[str, list[Source]]) -> dict[str, Matrix]:
    """Every matrix that a recipe may quantize, by checkpoint tensor name: of linear layers, routers and experts.

    A router is any other module with a two-dimensional `weight` of its own. Embeddings are lookups, not products.
    """
    found = {}
    for name, module in model.named_modules():
        if is_experts(module):
            projections = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
            for source in (s for projection in projections for s in sources[f"{name}.{projection}"]):
                *experts, out_features, in_features = source.shape
                if module.is_transposed:
                    out_features, in_features = in_features, out_features
                found[source.name] = Matrix(
                    source, out_features, in_features, tuple(experts), bool(module.is_transposed)
                )
        elif not isinstance(module, nn.Embedding) and f"{name}.weight" in sources:
            (source,) = sources[f"{name}.weight"]
            if len(source.shape) == 2:
                found[source.name] = Matrix(source, *source.shape)
    return found


def _expert_places(
    parameter: str, shape: tuple[int, ...], patterns: list[str], operations: list[Any]
) -> list[tuple[str, tuple[int, ...], Index]]:
    """(name, shape, index) of the tensors that fill a fused parameter [E, P * rows, columns].

    Each pattern names one projection, with `*` for the expert.
    """
    kinds = [(type(op), op.dim) for op in operations if isinstance(op, MergeModulelist | Concatenate)]
    stacked = kinds == [(MergeModulelist, 0)] and len(patterns) == 1
    concatenated = kinds == [(MergeModulelist, 0), (Concatenate, 1)]
    if not (stacked or concatenated) or len(kinds) != len(operations):
        raise InputError(f"{parameter}: assembled by {operations}, expected a stack of experts' tensors")
    experts, rows, *rest = shape
    rows //= len(patterns)
    return [
        (
            pattern.replace("*", str(expert)),
            (rows, *rest),
            (expert, slice(p * rows, (p + 1) * rows)) if concatenated else (expert,),
        )
        for expert in range(experts)
        for p, pattern in enumerate(patterns)
    ]
