"""Which module is quantized how: a recipe applied to a model's structure gives its QuantizationConfig.

The recipe speaks of roles (matrices that read a norm, inner ones, routers); the config speaks of checkpoint names, so
that a loader needs no recipe.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from codequant.errors import InputError
from codequant.packing import groups_per_row
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.recipe import Recipe
from codequant.source import SourceModel


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint that a recipe may quantize."""

    module: str  # checkpoint name, per expert
    layer: int
    out_features: int
    in_features: int
    is_inner: bool  # its input does not come from a norm of the residual stream
    is_router: bool  # a router, or a gate of one output
    is_expert: bool


def matrices(source: SourceModel) -> Iterator[Matrix]:
    """Every linear map of the decoder layers, in checkpoint order."""
    for index, structure in enumerate(source.structures):
        prefix = source.layer_names[index]
        for site in structure.sites:
            for reader in site.readers:
                (entry,) = source.sources[f"{prefix}.{reader}.weight"]
                rows, columns = entry.shape
                is_router = reader in structure.routers or rows == 1
                yield Matrix(entry.module, index, rows, columns, site.norm is None, is_router, is_expert=False)
        if structure.experts is not None:
            for name, is_inner in source.expert_matrices(index):
                for entry in source.sources[name]:
                    *_, rows, columns = entry.shape
                    if structure.experts.is_transposed:
                        rows, columns = columns, rows
                    yield Matrix(entry.module, index, rows, columns, is_inner, is_router=False, is_expert=True)


def quantization_config(source: SourceModel, recipe: Recipe) -> QuantizationConfig:
    """The config of the output. Raises InputError where a group size does not divide a matrix that it applies to."""
    weights, activations = recipe.weights, recipe.activations
    default = Scheme(weights.bits, weights.group_size, activations.bits, activations.clip)
    inner: dict[str, Any] = {
        "activation_bits": activations.inner_bits or activations.bits,
        "activation_clip": activations.inner_clip or activations.clip,
    }
    inner = {key: value for key, value in inner.items() if value != asdict(default)[key]}
    ignore, overrides = {source.head_name: None}, {}
    for matrix in matrices(source):
        pattern = any_layer(matrix.module)
        if (matrix.is_router and not (weights.router and matrix.out_features > 1)) or (
            matrix.is_inner and weights.coverage == "normed-inputs"
        ):
            ignore[pattern] = None
            continue
        if matrix.is_inner:
            changes = inner | ({"hadamard": True} if activations.hadamard and matrix.is_expert else {})
            if changes:
                overrides[pattern] = changes
        try:
            groups_per_row(matrix.in_features, weights.group_size)
        except ValueError as error:
            raise InputError(f"{matrix.module}: {error}") from error
    return QuantizationConfig(default, tuple(ignore), overrides)


def any_layer(module: str) -> str:
    """A checkpoint name with layer and expert numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)
