"""What a finished folder must hold: names, shapes and types from the headers alone, and every value for `verify`.

transformers only warns about a missing or extra tensor and fills the hole with random numbers, so every load of a
codequant folder passes through here first.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from codequant import packing
from codequant.checkpoint_names import matrices, parameter_sources, skeleton
from codequant.errors import InputError, VerificationError
from codequant.quantization_config import QuantizationConfig
from codequant.store import file_sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Names of the safetensors format. Only these types can occur in a folder: anything else is an error.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor in a file. dtype None: any floating-point type, for what stays unquantized."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def __str__(self) -> str:
        return f"{'float' if self.dtype is None else str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    def admits(self, other: "TensorSpec") -> bool:
        same_type = self.dtype == other.dtype or (
            self.dtype is None and other.dtype is not None and other.dtype.is_floating_point
        )
        return same_type and self.shape == other.shape


def read_config(folder: Path) -> tuple[PretrainedConfig, QuantizationConfig]:
    """The two configurations of a codequant folder. Raises InputError where it is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one written by codequant")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, expected a folder written by codequant")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'}: {_one_line(error)}") from error
    values = getattr(config, "quantization_config", None)
    if values is None:
        raise InputError(f"{folder}: config.json has no quantization_config, expected a folder written by codequant")
    return config, QuantizationConfig.from_dict(values)


def expected_tensors(model: PreTrainedModel, config: QuantizationConfig) -> dict[str, TensorSpec]:
    """Every tensor that a quantized checkpoint of this (plain) model holds, by name."""
    sources = parameter_sources(model)
    quantizable = matrices(model, sources)
    state = model.state_dict()
    expected = {}
    for source in (s for entries in sources.values() for s in entries):
        matrix = quantizable.get(source.name)
        scheme = config.scheme(source.module) if matrix is not None else None
        if matrix is None or scheme is None:
            dtype = state[source.parameter].dtype
            expected[source.name] = TensorSpec(source.shape, None if dtype.is_floating_point else dtype)
            continue
        try:
            shapes = packing.shapes(matrix.out_features, matrix.in_features, scheme.bits, scheme.group_size)
        except ValueError as error:
            raise InputError(f"{source.module}: {error}") from error
        for suffix, shape in shapes.items():
            expected[f"{source.name}_{suffix}"] = TensorSpec((*matrix.experts, *shape), packing.DTYPES[suffix])
    return expected


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises InputError for a missing or unreadable index or a missing file, and for
    one that lies outside the folder."""
    if (folder / WEIGHTS).is_file():
        return [_inside(folder, WEIGHTS)]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX}, expected one of them")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: not a JSON object with a weight_map of file names") from error
    return [_inside(folder, name) for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """Every tensor of these safetensors files. Raises VerificationError for a damaged file or a name found twice."""
    found: dict[str, TensorSpec] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise VerificationError(f"{name}: found again in {file.name}, expected one file to hold it")
                    part = shard.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in DTYPES:
                        raise VerificationError(f"{name}: type {dtype}, expected one of {sorted(DTYPES)}")
                    found[name] = TensorSpec(tuple(part.get_shape()), DTYPES[dtype])
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"{file.name}: truncated or damaged ({_one_line(error)})") from error
    return found


def compare_tensors(expected: dict[str, TensorSpec], found: dict[str, TensorSpec], ignored: Iterable[str] = ()) -> None:
    """Raises VerificationError naming the first tensor that is missing, has another shape or type, or is unexpected.

    `ignored`: tensors that the model itself leaves out when it loads, such as multi-token-prediction layers.
    """
    for name, spec in expected.items():
        if name not in found:
            raise VerificationError(f"{name}: missing, expected {spec}")
        if not spec.admits(found[name]):
            raise VerificationError(f"{name}: {found[name]}, expected {spec}")
    if extra := sorted(found.keys() - expected.keys() - set(ignored)):
        raise VerificationError(
            f"{extra[0]}: unexpected tensor ({len(extra)} in all), expected none beyond the model's"
        )


def check_model_files(model: PreTrainedModel, config: QuantizationConfig, files: Iterable[Path]) -> None:
    """Raises where these files are not exactly the quantized form of this (plain) model."""
    found = read_headers(files)
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    ignored = [name for name in found if any(pattern.search(name) for pattern in patterns)]
    compare_tensors(expected_tensors(model, config), found, ignored)


def check_tensors(folder: str | Path) -> None:
    """Raises InputError or VerificationError, one line with a name, unless the headers of the folder's weight files
    hold exactly the tensors that its config.json implies. Reads no weights."""
    folder = Path(folder)
    config, quantization = read_config(folder)
    check_model_files(_skeleton(folder, config), quantization, weight_files(folder))


def _skeleton(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    try:
        return skeleton(config)
    except ValueError as error:
        raise InputError(f"{folder}: {type(config).__name__} is not a causal language model") from error


def _inside(folder: Path, name: str) -> Path:
    """folder / name, a file in the folder. A symbolic link may lead out only to the `blobs` of a hub cache, where
    snapshots/REVISION/NAME points to ../../blobs/HASH."""
    file = folder / name
    here = folder.resolve()
    target = file.resolve()
    in_folder = (here / name).is_relative_to(here) and ".." not in Path(name).parts
    if not in_folder or not (target.is_relative_to(here) or target.parent == here.parent.parent / "blobs"):
        raise InputError(f"{name}: lies outside {folder}, expected a weight file of the folder")
    if not file.is_file():
        raise VerificationError(f"{name}: missing weight file, named by {INDEX}")
    return file


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def verify(folder: str | Path, source: str | Path | None = None) -> Iterator[str]:
    """Run every check on a finished folder; yields each one's name when it has passed.

    Raises VerificationError naming what is wrong and where, InputError where the folder is none of codequant's. With
    `source`, also that the folder was made from that very model.
    """
    folder = Path(folder)
    config, quantization = read_config(folder)
    files = weight_files(folder)
    check_model_files(_skeleton(folder, config), quantization, files)
    yield "every tensor of the model is there, with its shape and type, and no other"
    _check_provenance(folder)
    yield "no file has changed since it was written"
    _check_left_alone(folder, quantization)
    yield "router and output head are as the recipe says"
    for file in files:
        _check_values(file)
    yield "values are finite, codebooks ascending, steps not negative"
    if source is not None:
        _check_source(folder, Path(source))
        yield "made from this source"


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / "codequant.json"
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(provenance.get("files"), dict):
            return provenance
    except (OSError, ValueError, AttributeError) as error:
        raise VerificationError(f"{path.name}: missing or not JSON ({_one_line(error)})") from error
    raise VerificationError(f"{path.name}: has no file hashes, expected an entry `files`")


def _check_provenance(folder: Path) -> None:
    for name, expected in _provenance(folder)["files"].items():
        file = _inside(folder, name)
        if (digest := file_sha256(file)) != expected:
            raise VerificationError(f"{name}: SHA-256 {digest[:12]}..., expected {expected[:12]}...")


def _check_left_alone(folder: Path, config: QuantizationConfig) -> None:
    """The recipe decides about the router; the head is never quantized. config.json must say the same."""
    recipe = _provenance(folder)["recipe"]
    ignored = set(config.ignore)
    if not any(pattern.endswith(("head", "embed_out")) for pattern in ignored):
        raise VerificationError(f"config.json: ignore {sorted(ignored)} names no output head, expected one")
    has_router = any(pattern.rpartition(".")[2] in ("gate", "router") for pattern in ignored)
    if has_router and recipe["weights"]["router"]:
        raise VerificationError("config.json: leaves the router alone, the recipe quantizes it")


def _check_values(file: Path) -> None:
    with safe_open(file, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - not a mapping
            tensor = shard.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise VerificationError(f"{name}: holds NaN or infinity")
            if name.endswith("_codebook") and bool((tensor[..., 1:] < tensor[..., :-1]).any()):
                raise VerificationError(f"{name}: entries are not ascending")
            if name.endswith("_step") and bool((tensor < 0).any()):
                raise VerificationError(f"{name}: holds a negative step")


def _check_source(folder: Path, source: Path) -> None:
    for name, expected in _provenance(folder)["source"]["files"].items():
        if not (source / name).is_file():
            raise VerificationError(f"source: {name} is missing in {source}")
        if file_sha256(source / name) != expected:
            raise VerificationError(f"source: {name} differs from the file that was quantized")
