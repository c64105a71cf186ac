"""From a plain model skeleton to one with quantized modules, and the names under which its tensors are stored."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, WeightTransform

from codequant import packing
from codequant.checkpoint_names import Source, is_experts, matrices, parameter_sources
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.runtime.modules import CodebookExperts, CodebookLinear, Part, quantize_weight_of


class NameTable(WeightRenaming):
    """Renames checkpoint tensors by an exact table, in both directions.

    It replaces the renaming patterns of transformers' conversion mapping: those end at a name boundary in some versions
    and not in others, so that `gate.weight` may or may not match `gate.weight_packed`.
    """

    __slots__ = ("names",)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__(source_patterns="checkpoint", target_patterns="model")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        # As it saves, transformers 5.17 renames `experts.*.w1.weight` once for all experts: the first stands for them.
        name = self.names.get(source_key.replace("*", "0"))
        if name is None:
            return source_key, None
        self._was_used = True
        return name, self.source_patterns[0]

    def reverse_transform(self) -> "NameTable":
        return NameTable({new: old for old, new in self.names.items()})


class UnmergedTensors(WeightConverter):
    """Tensors that the model holds one by one, as the checkpoint does.

    transformers would make a renaming object for each, with a regular expression to compile: most of the time to
    load or save a model with thousands of experts. This converter is copied instead, and cheaply.
    """

    __slots__ = ("names",)

    def __init__(self, names: list[str]) -> None:
        super().__init__(source_patterns="model", target_patterns="model", operations=[Concatenate()])
        self.source_patterns[:] = names
        self.names = frozenset(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return source_key, source_key

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, list[torch.Tensor]]:
        (tensors,) = self.materialize_tensors().values()
        return {layer_name: tensors}

    def reverse_transform(self) -> "UnmergedTensors":
        return UnmergedTensors(self.source_patterns)

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnmergedTensors":
        fresh = copy.copy(self)
        fresh.collected_tensors, fresh.layer_targets = defaultdict(list), defaultdict(set)
        return fresh


def replace_modules(model: PreTrainedModel, config: QuantizationConfig) -> list[WeightTransform]:
    """Swap every module of a meta-device model that `config` quantizes, in place.

    Returns what takes the checkpoint's tensors to the model's: their names, and which of them need no merging. Tensors
    of experts that stay plain get the names from which transformers' own converters merge them.
    """
    sources = parameter_sources(model)
    quantizable = matrices(model, sources)
    names = {source.name: source.local for entries in sources.values() for source in entries}

    def scheme_of(source: Source) -> Scheme | None:
        return config.scheme(source.module) if source.name in quantizable else None

    def store_packed(source: Source, stem: str) -> None:
        del names[source.name]
        names.update({f"{source.name}_{suffix}": f"{stem}_{suffix}" for suffix in packing.SUFFIXES})

    def replace_experts(name: str, module: Any) -> None:
        owned = {parameter: sources[f"{name}.{parameter}"] for parameter, _ in module.named_parameters(recurse=False)}
        parts = {
            parameter: [
                Part(_stem(s, name), s.module, s.shape, fused=s.index == (), scheme=scheme_of(s)) for s in entries
            ]
            for parameter, entries in owned.items()
        }
        if all(part.scheme is None for entries in parts.values() for part in entries):
            return
        model.set_submodule(name, CodebookExperts(module, parts, module.down_proj.dtype))
        for source in (s for entries in owned.values() for s in entries):
            stem = f"{name}.{_stem(source, name)}"
            if scheme_of(source) is None:
                names[source.name] = stem
            else:
                store_packed(source, stem)

    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if is_experts(module):
                replace_experts(name, module)
                continue
            for source in sources.get(f"{name}.weight", ()):
                if (scheme := scheme_of(source)) is not None:
                    _replace_matrix(model, name, module, scheme)
                    store_packed(source, f"{name}.weight")
    state = model.state_dict()
    return [NameTable(names), UnmergedTensors([name for name in names.values() if name in state])]


def _stem(source: Source, experts: str) -> str:
    """What an experts module calls a tensor: a name without dots, which no pattern of transformers matches."""
    return source.local.removeprefix(f"{experts}.").replace(".", "/")


def _replace_matrix(model: PreTrainedModel, name: str, module: Any, scheme: Scheme) -> None:
    if type(module).forward is not nn.Linear.forward:
        quantize_weight_of(module, scheme)
        return
    has_bias = module.bias is not None
    linear = CodebookLinear(module.in_features, module.out_features, has_bias, scheme, module.weight.dtype)
    model.set_submodule(name, linear)
