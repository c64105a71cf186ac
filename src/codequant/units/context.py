"""What every unit may use: the source model, the recipe, and the results of other units."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from codequant.folding import fold_layer, gain_of, head_blocks, mix_pair, rotate_rows
from codequant.hadamard import hadamard_matrix
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.recipe import Recipe
from codequant.schemes import matrices, quantization_config
from codequant.source import SourceModel
from codequant.store import Store
from codequant.structure import ChannelPair, ExpertsStructure
from codequant.working_layer import WorkingLayer

Result = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and what the report shows
# Second moments and weights of one shard of experts. A GPU wants it large, because its sweeps over columns take as long
# for one expert as for several; 16 experts of Qwen3-30B-A3B fill it as well as 32, and leave room for a second worker.
SHARD_BYTES = {"cpu": 384 << 20, "cuda": 3 << 30}
MIN_SHARDS = 4  # per layer, so that small layers too keep several workers busy
ALLOCATION = "allocation"  # key of the unit that gives every expert its bits
WINDOWS = "calibration"  # key of the token windows, int32 [N, T]


def hidden_key(stream: str, layer: int, shard: int) -> str:
    """Key of the unit that makes the input of `layer`."""
    if layer == 0:
        return f"{'embed' if stream == 'teacher' else 'enter'}.w{shard:03d}"
    return f"{stream}.l{layer - 1:03d}.w{shard:03d}"


def dense_key(layer: int) -> str:
    return f"dense.l{layer:03d}"


def layer_key(layer: int) -> str:
    return f"layer.l{layer:03d}"


def route_key(layer: int, shard: int) -> str:
    return f"route.l{layer:03d}.w{shard:03d}"


def sensitivity_key(layer: int) -> str:
    return f"sensitivity.l{layer:03d}"


def bits_name(layer: int) -> str:
    """Of a tensor in the result of `allocation`."""
    return f"bits.l{layer:03d}"


def experts_key(layer: int, shard: int) -> str:
    return f"experts.l{layer:03d}.s{shard:03d}"


class Context:
    """What every unit may use: the source model, the recipe and the results of other units."""

    def __init__(self, source: SourceModel, recipe: Recipe, store: Store, device: str = "cpu") -> None:
        self.source, self.recipe, self.store, self.device = source, recipe, store, torch.device(device)

    @cached_property
    def config(self) -> QuantizationConfig:
        """How every matrix is quantized, but for the experts' own bits where the recipe gives a target for them."""
        return quantization_config(self.source, self.recipe)

    @property
    def allocates(self) -> bool:
        return self.recipe.weights.target_bits is not None

    def output_config(self) -> QuantizationConfig:
        """`config` with the bits that every expert got."""
        if not self.allocates:
            return self.config
        own: dict[str, int] = {}
        for layer in self.experts_by_layer:
            bits = self.expert_bits(layer, slice(None))
            for k, (parameter, _) in enumerate(self.source.expert_matrices(layer)):
                if self.experts_scheme(layer, inner=bool(k)) is not None:
                    for entry in self.source.sources[parameter]:
                        own[entry.module] = bits[int(entry.index[0]) if entry.index else 0][k]  # type: ignore[arg-type]
        changed = {module: {"bits": b} for module, b in own.items() if b != self.config.default.bits}
        by_bits = dict(sorted(changed.items(), key=lambda item: item[1]["bits"]))
        return replace(self.config, overrides=self.config.overrides | by_bits)

    def expert_bits(self, layer: int, chosen: slice) -> list[tuple[int, int]]:
        """Bits of gate_up and of down, for each expert of a run."""
        if not self.allocates:
            return [(self.recipe.weights.bits,) * 2] * len(range(self.experts_by_layer[layer].num_experts)[chosen])
        return [tuple(b) for b in self.store.read_one(ALLOCATION, bits_name(layer))[chosen].tolist()]

    @cached_property
    def experts_by_layer(self) -> dict[int, ExpertsStructure]:
        """Of the layers that have experts."""
        return {l: s.experts for l, s in enumerate(self.source.structures) if s.experts is not None}

    def expert_size(self, layer: int) -> tuple[int, int]:
        """Weights in one expert's gate_up and in its down."""
        structure = self.experts_by_layer[layer]
        one = self.source.hidden_size * structure.intermediate
        return (2 if structure.has_gate else 1) * one, one

    def quantized_weights(self) -> tuple[int, int]:
        """Weights in the quantized matrices of all experts, and in all other quantized matrices."""
        experts = 0
        for layer, structure in self.experts_by_layer.items():
            for k, size in enumerate(self.expert_size(layer)):
                if self.experts_scheme(layer, inner=bool(k)) is not None:
                    experts += structure.num_experts * size
        others = (m for m in matrices(self.source) if not m.is_expert and self.config.scheme(m.module) is not None)
        return experts, sum(m.out_features * m.in_features for m in others)

    @cached_property
    def arguments(self) -> list[dict[str, Any]]:
        """Each layer's keyword arguments for one calibration window, on the device."""
        return [to_device(a, self.device) for a in self.source.layer_arguments(self.recipe.calibration.length)]

    @property
    def calibrates_on_source(self) -> bool:
        return self.recipe.weights.inputs == "source"

    @cached_property
    def rotates(self) -> bool:
        return self.recipe.rotation.method != "none"

    @cached_property
    def rotation(self) -> Tensor | None:
        if not self.rotates:
            return None
        return self.store.read_one("rotation", "rotation").to(self.device)

    @property
    def window_shards(self) -> int:
        c = self.recipe.calibration
        return -(-c.windows // c.windows_per_unit)

    def windows(self, shard: int) -> Tensor:
        n = self.recipe.calibration.windows_per_unit
        return self.store.read_one(WINDOWS, "windows")[shard * n : (shard + 1) * n].long()

    def hidden(self, stream: str, layer: int, shard: int) -> Tensor:
        """The input [n, T, H] of a layer in the teacher's or the student's residual stream.

        A student that is calibrated on the source's own hidden states has no stream of its own.
        """
        if stream == "student" and self.calibrates_on_source:
            return rotate_rows(self.hidden("teacher", layer, shard), self.rotation)
        return self.store.read_one(hidden_key(stream, layer, shard), "hidden").to(self.device)

    def routed_batches(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """The results of `route`, a shard of windows at a time, mapped: an expert's tokens are a small part of them."""
        for shard in range(self.window_shards):
            yield self.store.map(route_key(layer, shard))

    @property
    def held_out_shards(self) -> int:
        """How many shards of windows, the last ones, judge fine-tuning."""
        wanted = round(self.window_shards * self.recipe.finetuning.held_out)
        return min(max(1, wanted), self.window_shards - 1)

    def expert_shards(self, layer: int) -> list[slice]:
        """Runs of experts whose second moments and weights fit in SHARD_BYTES."""
        experts = self.source.structures[layer].experts
        if experts is None:
            return []
        H, M = self.source.hidden_size, experts.intermediate
        bytes_per_expert = 4 * (4 * H * H + 4 * M * M + 6 * 3 * H * M)
        size = max(1, min(-(-experts.num_experts // MIN_SHARDS), SHARD_BYTES[self.device.type] // bytes_per_expert))
        return [slice(i, min(i + size, experts.num_experts)) for i in range(0, experts.num_experts, size)]

    def module_name(self, layer: int, reader: str) -> str:
        (entry,) = self.source.sources[f"{self.source.layer_names[layer]}.{reader}.weight"]
        return entry.module

    def scheme(self, layer: int, reader: str) -> Scheme | None:
        return self.config.scheme(self.module_name(layer, reader))

    def folded_tensors(self, layer: int, rotation: Tensor | None) -> dict[str, Tensor]:
        """A layer's non-expert tensors with gains folded, value heads mixed and the residual rotated."""
        tensors = {k: v.to(self.device) for k, v in self.source.layer_tensors(layer).items()}
        structure = self.source.structures[layer]
        tensors = fold_layer(tensors, structure, rotation)
        for pair in structure.pairs:
            if self.mixes(layer, pair):
                mix_pair(tensors, pair, [hadamard_matrix(pair.block)] * len(head_blocks(pair)))
        return tensors

    def mixes(self, layer: int, pair: ChannelPair) -> bool:
        """Whether a pair's channels are rotated: value heads whose consumer is quantized."""
        return (
            self.rotates
            and self.recipe.rotation.heads
            and pair.linear
            and self.scheme(layer, pair.consumer) is not None
        )

    def permutes(self, layer: int, pair: ChannelPair) -> bool:
        """Whether a pair's channels are put in order: those whose consumer has several codebooks per row, and which no
        rotation has made alike."""
        scheme = self.scheme(layer, pair.consumer)
        return (
            self.recipe.permutation.enabled
            and scheme is not None
            and scheme.group_size != -1
            and not self.mixes(layer, pair)
        )

    def permutes_experts(self, layer: int) -> bool:
        """Likewise for the intermediate channels of a layer's experts."""
        scheme = self.experts_scheme(layer, inner=True)
        return (
            self.recipe.permutation.enabled and scheme is not None and scheme.group_size != -1 and not scheme.hadamard
        )

    def working_layer(self, layer: int, tensors: dict[str, Tensor]) -> WorkingLayer:
        source = self.source
        return WorkingLayer(source.layers[layer], source.structures[layer], self.arguments[layer], tensors)

    def experts_gain(self, layer: int) -> Tensor | None:
        norm = self.source.structures[layer].experts_norm
        if norm is None:
            return None
        name = f"{self.source.layer_names[layer]}.{norm.path}"
        tensors = {f"{norm.path}.weight": self.source.read(f"{name}.weight", torch.float32)}
        if norm.has_bias:
            tensors[f"{norm.path}.bias"] = self.source.read(f"{name}.bias", torch.float32)
        return gain_of(norm, tensors).to(self.device)

    def experts_basis(self, layer: int) -> Tensor | None:
        """The rotation, where the experts read the residual stream through a norm."""
        return self.rotation if self.source.structures[layer].experts_norm is not None else None

    def experts_scheme(self, layer: int, inner: bool) -> Scheme | None:
        """How a layer's experts read their input (inner: their intermediate); the same for all experts of a layer, but
        for the bits of their weights where the recipe gives a target for those (`expert_bits`)."""
        name, _ = self.source.expert_matrices(layer)[int(inner)]
        return self.config.scheme(self.source.sources[name][0].module)

    def apply_gate(self, layer: int) -> Callable[[Tensor], Tensor]:
        """[N, 2M] gate and up -> [N, M], by the experts module's own rule (activation, clamps)."""
        structure = self.experts_by_layer[layer]
        module: Any = self.source.layers[layer].get_submodule(structure.path)
        if not structure.has_gate:
            return module.act_fn

        def apply(x: Tensor) -> Tensor:
            if not structure.is_concatenated:  # the module's rule expects its own interleaved order
                x = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
            return module._apply_gate(x)

        return apply


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value
