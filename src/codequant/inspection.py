"""What is inside an output folder: which modules have how many bits and bytes. Only headers and JSON are read."""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from codequant.checkpoint_names import by_checkpoint_name, parameter_sources, skeleton
from codequant.errors import InputError
from codequant.packing import SUFFIXES
from codequant.quantization_config import Scheme
from codequant.verification import TensorSpec, read_config, read_headers, weight_files

PROVENANCE = "codequant.json"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer or an expert, in a dotted name


@dataclass(frozen=True)
class Kind:
    """All tensors that differ in their layer's and expert's number alone."""

    name: str  # of the module or tensor, `*` for the numbers
    layers: tuple[int, ...]  # empty outside decoder layers
    count: int
    shape: tuple[int, ...]  # of each, before packing
    scheme: Scheme | None  # None: not quantized
    dtype: str  # as stored; of packed weights, the indices'
    bytes: int  # of all together, codebooks and steps included

    @property
    def parameters(self) -> int:
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    architecture: str
    kinds: tuple[Kind, ...]
    provenance: dict[str, Any]  # codequant.json; empty where there is none

    @property
    def parameters(self) -> int:
        return sum(kind.parameters for kind in self.kinds)

    @property
    def bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds)

    @property
    def bits_per_weight(self) -> float:
        """Over all parameters, those left in the source's precision included."""
        return 8 * self.bytes / self.parameters

    @property
    def bits_per_quantized_weight(self) -> float:
        """Over the quantized matrices alone; nan where there are none."""
        quantized = [kind for kind in self.kinds if kind.scheme is not None]
        parameters = sum(kind.parameters for kind in quantized)
        return 8 * sum(kind.bytes for kind in quantized) / parameters if parameters else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "kinds": [asdict(kind) for kind in self.kinds],
            "provenance": self.provenance,
        }


def inspect_folder(folder: str | Path) -> Inspection:
    """Read an output folder's headers. Raises InputError where it is none, VerificationError where a file is damaged.

    Whether the tensors are the right ones is not asked here: `verification` does that.
    """
    folder = Path(folder)
    config, quantization = read_config(folder)
    model = skeleton(config)
    stored = read_headers(weight_files(folder))
    kinds: dict[tuple[str, tuple[int, ...], Scheme | None], Kind] = {}

    def add(name: str, shape: tuple[int, ...], scheme: Scheme | None, parts: list[TensorSpec]) -> None:
        numbers = _NUMBER.findall(name)  # the layer's, then the expert's
        pattern = _NUMBER.sub("*", name)
        dtype = str(parts[0].dtype).removeprefix("torch.")
        kind = kinds.get((pattern, shape, scheme), Kind(pattern, (), 0, shape, scheme, dtype, 0))
        kinds[pattern, shape, scheme] = replace(
            kind,
            layers=tuple(sorted({*kind.layers, *map(int, numbers[:1])})),
            count=kind.count + 1,
            bytes=kind.bytes + sum(math.prod(part.shape) * part.dtype.itemsize for part in parts if part.dtype),
        )

    for name, source in by_checkpoint_name(parameter_sources(model)).items():
        packed = [stored.pop(part) for part in (f"{name}_{suffix}" for suffix in SUFFIXES) if part in stored]
        if packed:
            add(source.module, source.shape, quantization.scheme(source.module), packed)
        elif name in stored:
            add(source.module, source.shape, None, [stored.pop(name)])
    for name, spec in stored.items():  # what the model does not use, such as layers for multi-token prediction
        add(name.removesuffix(".weight"), spec.shape, None, [spec])
    return Inspection(type(model).__name__, tuple(kinds.values()), _provenance(folder))


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON, expected what codequant wrote") from error


def render(inspection: Inspection) -> Group:
    """The inspection for people: one line of totals, one row per kind, and where it all comes from."""
    totals = (
        f"{inspection.architecture}: {inspection.parameters:,} parameters in {decimal(inspection.bytes)}, "
        f"{inspection.bits_per_weight:.2f} bits each ({inspection.bits_per_quantized_weight:.2f} where quantized)"
    )
    table = Table(
        Column("module", overflow="fold"),
        "layers",
        "count",
        "shape",
        "weights",
        "activations",
        "size",
        box=None,
        pad_edge=False,
    )
    for kind in inspection.kinds:
        table.add_row(
            kind.name,
            _ranges(kind.layers),
            f"{kind.count:,}",
            " x ".join(map(str, kind.shape)),
            kind.dtype if kind.scheme is None else _weights(kind.scheme),
            "" if kind.scheme is None else _activations(kind.scheme),
            decimal(kind.bytes),
        )
    return Group(Text(totals), "", table, *_origin(inspection.provenance))


def _weights(scheme: Scheme) -> str:
    return f"{scheme.bits} bits per {'row' if scheme.group_size == -1 else f'{scheme.group_size} columns'}"


def _activations(scheme: Scheme) -> str:
    bits = "full" if scheme.activation_bits == 16 else f"{scheme.activation_bits} bits"
    clip = f", clipped at {scheme.activation_clip:g}" if scheme.activation_clip != 1 else ""
    return f"{bits}{clip}{', Hadamard' if scheme.hadamard else ''}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _origin(provenance: dict[str, Any]) -> list[Text]:
    """One line each for what codequant.json says of source, calibration and versions."""
    lines = []
    for key in ("source", "calibration", "versions"):
        if values := provenance.get(key):
            shown = {name: value for name, value in values.items() if not isinstance(value, dict)}
            lines.append(Text(f"{key}: {', '.join(f'{name} {value}' for name, value in shown.items())}"))
    return [Text(), *lines] if lines else []
