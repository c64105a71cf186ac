"""The source model, read a layer at a time: a skeleton on the meta device and a folder of safetensors shards.

Nothing here holds more than what is asked for. Block-quantized sources (FP8 as DeepSeek-V3 stores it, MXFP4 as GPT-OSS
does) are dequantized on the way; other quantized sources are refused by name.
"""

import copy
import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from codequant.checkpoint_names import Source as TensorSource
from codequant.checkpoint_names import parameter_sources, skeleton
from codequant.discovery import TOKENS, describe_experts, discover, is_experts, is_norm
from codequant.errors import InputError
from codequant.structure import ExpertsStructure, LayerStructure

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 1 << 22  # bytes, whole elements of every type
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # tokenizer and generation files


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, from its shard's header."""

    file: str
    dtype: str  # safetensors name
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes

    @property
    def is_block_quantized(self) -> bool:
        return self.dtype == "F8_E4M3"


class Checkpoint:
    """A folder of safetensors shards: every tensor by name, read one at a time.

    block: rows and columns that share a scale in FP8 matrices, None where the source has none.
    """

    def __init__(self, folder: Path, block: tuple[int, int] | None = None) -> None:
        self.folder = folder
        self.block = block
        self.entries: dict[str, Entry] = {}
        for file, expected in self._files().items():
            path = folder / file
            if not path.is_file():
                raise InputError(f"{file}: missing, expected the shard that {INDEX} names in {folder}")
            try:
                with safe_open(path, "pt"):  # checks the header against the length of the file
                    pass
                self.entries |= read_header(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from error
            if lost := sorted(expected - self.entries.keys()):
                raise InputError(f"{file}: tensor {lost[0]} is missing, {INDEX} says that it is there")
        for name, entry in self.entries.items():
            if entry.dtype not in DTYPES:
                raise InputError(f"{name}: type {entry.dtype} in {entry.file}, expected one of {', '.join(DTYPES)}")
            if entry.is_block_quantized and (block is None or f"{name}_scale_inv" not in self.entries):
                raise InputError(
                    f"{name}: {entry.dtype} without {name}_scale_inv and a weight_block_size in config.json, expected "
                    "FP8 in blocks with scales"
                )

    def _files(self) -> dict[str, set[str]]:
        """Shard file names with the tensors that the index expects in each."""
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise InputError(f"{self.folder}: no {SINGLE} and no {INDEX}, expected safetensors weights")
            return {SINGLE: set()}
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{INDEX}: not a safetensors index ({error})") from error
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise InputError(f"{INDEX}: {name} lies in {file!r}, expected a file name inside the model folder")
            files.setdefault(file, set()).add(name)
        return dict(sorted(files.items()))

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.entries.values()})

    def entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise InputError(f"{name}: no such tensor in {self.folder}, the model's configuration needs it") from None

    def stores(self, name: str) -> bool:
        return name in self.entries or f"{name}_blocks" in self.entries

    def dtype(self, name: str) -> torch.dtype:
        """What `read` returns: the stored type, bfloat16 where it dequantizes."""
        if f"{name}_blocks" in self.entries or self.entry(name).is_block_quantized:
            return torch.bfloat16
        return DTYPES[self.entry(name).dtype]

    def read(self, name: str, index: tuple = ()) -> Tensor:
        """A tensor or a slice of it, memory-mapped: only what is looked at is read. Quantized ones are dequantized."""
        if name not in self.entries and f"{name}_blocks" in self.entries:
            blocks, scales = (self._map(f"{name}_{part}")[index or ...] for part in ("blocks", "scales"))
            return dequantize_mxfp4(blocks, scales)
        if self.entry(name).is_block_quantized:
            assert self.block is not None
            return dequantize_fp8(self._map(name), self._map(f"{name}_scale_inv"), self.block)[index or ...]
        return self._map(name)[index or ...]

    def _map(self, name: str) -> Tensor:
        """The stored tensor on pages of its own, which are unmapped with it; a whole shard may exceed memory."""
        entry = self.entry(name)
        if not entry.size:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skip = entry.offset - start
        with (self.folder / entry.file).open("rb") as file:
            pages = mmap.mmap(file.fileno(), skip + entry.size, access=mmap.ACCESS_COPY, offset=start)
        flat = torch.frombuffer(pages, dtype=DTYPES[entry.dtype], offset=skip, count=math.prod(entry.shape))
        return flat.view(entry.shape)

    def scan(self, file: str) -> str:
        """SHA-256 of a shard, read once from end to end; raises InputError naming a tensor with NaN or infinity."""
        digest = hashlib.sha256()
        buffer = bytearray(CHUNK)
        entries = sorted((e.offset, name, e) for name, e in self.entries.items() if e.file == file)
        with (self.folder / file).open("rb") as stream:
            for offset, name, entry in entries:
                for _ in _pieces(stream, buffer, offset - stream.tell(), digest):
                    pass
                for piece in _pieces(stream, buffer, entry.size, digest):
                    if not _is_finite(piece, name, entry):
                        raise InputError(f"{name}: holds NaN or infinity in {file}, expected finite weights")
            for _ in _pieces(stream, buffer, (self.folder / file).stat().st_size - stream.tell(), digest):
                pass
        return digest.hexdigest()

    def copy_raw(self, names: Iterable[str], path: Path) -> None:
        """Write tensors to a new shard exactly as they are stored, whatever their size."""
        entries = {name: self.entries[name] for name in names}

        def pieces() -> Iterator[memoryview]:
            for entry in entries.values():
                with (self.folder / entry.file).open("rb") as stream:
                    stream.seek(entry.offset)
                    yield from _pieces(stream, bytearray(CHUNK), entry.size)

        write_shard(path, {name: (e.dtype, e.shape, e.size) for name, e in entries.items()}, pieces())


def write_shard(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]], data: Iterable[Any]) -> None:
    """A safetensors file of tensors (type, shape, bytes) whose buffers come one after another, never all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end := end + size)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in data:
            out.write(piece)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file that `safe_open` accepts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(path.name, e["dtype"], tuple(e["shape"]), 8 + length + start, end - start)
        for name, e in header.items()
        for start, end in [e["data_offsets"]]
    }


def _pieces(stream: BinaryIO, buffer: bytearray, size: int, digest: Any = None) -> Iterator[memoryview]:
    """The next `size` bytes of a stream, a bufferful at a time."""
    while size > 0:
        piece = memoryview(buffer)[: min(size, len(buffer))]
        if stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise InputError(f"{stream.name}: became shorter while it was read, expected a file that stays as it is")
        if digest is not None:
            digest.update(piece)
        size -= len(piece)
        yield piece


def _is_finite(piece: memoryview, name: str, entry: Entry) -> bool:
    if name.endswith("_scales") and entry.dtype == "U8":
        return 255 not in bytes(piece)  # E8M0: all ones is NaN
    values = torch.frombuffer(piece, dtype=DTYPES[entry.dtype])
    if not values.is_floating_point():
        return True
    if values.itemsize == 1:  # float8 has no kernels of its own
        values = values.float()
    return bool(torch.isfinite(values).all())


def dequantize_fp8(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """DeepSeek-V3: float8 [O, I] times scale_inv [O / rows, I / columns], rounded up, for block (rows, columns).

    Returns bfloat16 [O, I].
    """
    O, I = weight.shape
    rows, columns = block
    scale = scale_inv.float().repeat_interleave(rows, 0)[:O].repeat_interleave(columns, 1)[:, :I]
    return (weight.float() * scale).to(torch.bfloat16)


FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # OCP MX E2M1


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """GPT-OSS experts: uint8 blocks [..., O, I / 32, 16], low nibble first, and E8M0 scales [..., O, I / 32].

    Returns bfloat16 [..., I, O]: the transposed layout of the model's own parameters.
    """
    values = torch.tensor(FP4_VALUES, device=blocks.device)
    elements = torch.stack((values[(blocks & 0xF).long()], values[(blocks >> 4).long()]), dim=-1).flatten(-2)
    scaled = torch.ldexp(elements, scales.to(torch.int32).unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(-1, -2).to(torch.bfloat16)


def resolve(source: str | Path) -> Path:
    """The local folder of a model: a path, or a hub id fetched through huggingface_hub (offline from its cache)."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    looks_local = isinstance(source, Path) or folder.is_absolute() or str(source).startswith((".", "~"))
    if not looks_local and str(source).count("/") == 1:
        try:
            return Path(snapshot_download(str(source), allow_patterns=[*SIDE_FILES, "*.safetensors"]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"source: {str(source)!r} is no folder and could not be fetched from the hub: {reason}"
            ) from error
    raise InputError(
        f"source: {str(source)!r}, expected an existing model folder or a hub id such as Qwen/Qwen3-30B-A3B"
    )


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration, or InputError: no config, no causal language model, remote code, or quantized."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, expected a Hugging Face model folder")
    try:
        raw = json.loads((folder / "config.json").read_text())
        if "auto_map" in raw and raw.get("model_type") is None:
            raise ValueError("it needs remote code, which codequant does not run")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from error
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method")
        if method not in ("fp8", "mxfp4"):
            raise InputError(
                f"quantization_config: quant_method {method!r}, expected an unquantized, fp8 or mxfp4 source"
            )
        if method == "fp8" and len(quantization.get("weight_block_size") or ()) != 2:
            raise InputError(
                f"quantization_config: weight_block_size {quantization.get('weight_block_size')!r}, expected FP8 in "
                "blocks of rows and columns, as DeepSeek-V3 stores it"
            )
    return config


class _Recorder(nn.Module):
    """Stands in for a decoder layer: remembers what the model passes to it and hands the hidden states through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise InputError(f"{type(self.layer).__name__}: is passed positional arguments, expected keywords only")
        self.hidden_states, self.arguments = hidden_states, kwargs
        return hidden_states


class SourceModel:
    """A causal language model on disk: its structure, and its tensors by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = load_config(folder)
        try:
            self.model: PreTrainedModel = skeleton(self.config)
        except (ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{folder}: model_type {self.config.model_type!r} is no causal language model ({reason})"
            ) from error
        block = (getattr(self.config, "quantization_config", None) or {}).get("weight_block_size")
        self.checkpoint = Checkpoint(folder, block and tuple(block))
        self.base: nn.Module = self.model.base_model
        if not isinstance(getattr(self.base, "layers", None), nn.ModuleList):
            raise InputError(f"{folder}: {type(self.base).__name__} has no `layers`, expected a decoder-only model")
        _restore_buffers(self.model)
        self.layers: list[nn.Module] = list(self.base.layers)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.layer_names = [names[id(layer)] for layer in self.layers]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding is None or head is None:
            raise InputError(f"{folder}: {type(self.model).__name__} has no input or output embedding")
        self.embedding_name, self.head_name = names[id(embedding)], names[id(head)]
        final = [name for name, module in self.base.named_children() if is_norm(module)]
        if len(final) != 1:
            raise InputError(f"{folder}: {len(final)} norms after the last layer, expected one")
        self.norm_name = names[id(self.base.get_submodule(final[0]))]
        self.sources: dict[str, list[TensorSource]] = parameter_sources(self.model)
        needed = [source for entries in self.sources.values() for source in entries]
        if missing := [source.name for source in needed if not self.checkpoint.stores(source.name)]:
            raise InputError(
                f"{missing[0]}: no such tensor in {folder} ({len(missing)} are missing), the config needs it"
            )
        for source in needed:
            entry = self.checkpoint.entries.get(source.name)
            if entry is not None and entry.shape != source.shape:
                raise InputError(f"{source.name}: shape {entry.shape} in {entry.file}, the config needs {source.shape}")

    @property
    def hidden_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What unquantized tensors are stored in."""
        dtype = self.checkpoint.dtype(self.sources[f"{self.embedding_name}.weight"][0].name)
        return torch.float32 if dtype == torch.float64 else dtype

    @property
    def is_tied(self) -> bool:
        return f"{self.head_name}.weight" not in self.sources

    @cached_property
    def structures(self) -> list[LayerStructure]:
        """The wiring of every layer, discovered once."""
        arguments = self.layer_arguments(TOKENS)
        return [
            discover(layer, arguments[i], self.hidden_size, self.layer_names[i]) for i, layer in enumerate(self.layers)
        ]

    def experts(self, layer: int) -> ExpertsStructure | None:
        return self.structures[layer].experts

    def layer_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each layer besides hidden states, for one window of `length` tokens, no padding."""
        return self._record(torch.zeros(1, length, self.hidden_size))[1]

    def first_hidden_states(self, embedded: Tensor) -> Tensor:
        """Embedding vectors [N, T, H] -> the first layer's input (some models scale the embeddings)."""
        return self._record(embedded)[0]

    def _record(self, embedded: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        base = copy.copy(self.base)  # with module tables of its own: units on other threads use the skeleton too
        base._modules = dict(base._modules)
        base.layers = recorders = nn.ModuleList(_Recorder(layer) for layer in self.layers)
        setattr(base, self.norm_name.rpartition(".")[2], nn.Identity())
        with torch.no_grad():
            base(inputs_embeds=embedded, use_cache=False)
        arguments = [r.arguments for r in recorders]
        return recorders[0].hidden_states, [{k: v for k, v in a.items() if k != "past_key_values"} for a in arguments]

    def read(self, parameter: str, dtype: torch.dtype | None = None, index: slice | None = None) -> Tensor:
        """A model parameter in its fused layout; `index` picks a run of experts of a fused one."""
        entries = self.sources[parameter]
        if entries[0].index == ():
            tensor = self.checkpoint.read(entries[0].name, () if index is None else (index,))
            return tensor.to(dtype or tensor.dtype, copy=True)
        experts = range(*(index or slice(None)).indices(1 + max(int(e.index[0]) for e in entries)))
        shape = self.model.get_parameter_or_buffer(parameter).shape
        fused: Tensor | None = None
        for entry in entries:
            expert, *rest = entry.index
            if expert not in experts:
                continue
            part = self.checkpoint.read(entry.name)
            if fused is None:
                fused = torch.empty(len(experts), *shape[1:], dtype=dtype or part.dtype)
            fused[(experts.index(expert), *rest)] = part.to(fused.dtype)
        assert fused is not None
        return fused

    def layer_tensors(self, layer: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Everything of a layer but its experts, by path inside the layer."""
        prefix = f"{self.layer_names[layer]}."
        inside = next((f"{p}." for p, m in self.layers[layer].named_modules() if is_experts(m)), None)
        names = [name for name in self.sources if name.startswith(prefix)]
        paths = [name.removeprefix(prefix) for name in names]
        return {p: self.read(n, dtype) for n, p in zip(names, paths) if inside is None or not p.startswith(inside)}

    def expert_matrices(self, layer: int) -> list[tuple[str, bool]]:
        """The fused matrices of a layer's experts: (parameter, whether it reads the intermediate)."""
        prefix = f"{self.layer_names[layer]}.{self._experts_path(layer)}."
        first = "gate_up_proj" if self._experts_module(layer).has_gate else "up_proj"
        return [(f"{prefix}{first}", False), (f"{prefix}down_proj", True)]

    def expert_tensors(
        self, layer: int, experts: slice, dtype: torch.dtype | None = torch.float32
    ) -> dict[str, Tensor]:
        """A run of a layer's experts in canonical layout: gate_up [n, 2M, H], down [n, H, M] and their biases; None:
        as they are stored."""
        structure = describe_experts("experts", self._experts_module(layer))
        tensors = {}
        for key, (name, _) in zip(("gate_up", "down"), self.expert_matrices(layer)):
            weight = self.read(name, dtype, experts)
            tensors[key] = weight.transpose(1, 2) if structure.is_transposed else weight
            if structure.has_bias:
                tensors[f"{key}_bias"] = self.read(f"{name}_bias", dtype, experts)
        if structure.has_gate and not structure.is_concatenated:
            for key in ("gate_up", "gate_up_bias"):
                if key in tensors:
                    tensors[key] = torch.cat((tensors[key][:, 0::2], tensors[key][:, 1::2]), dim=1)
        return {key: tensor.contiguous() for key, tensor in tensors.items()}

    def _experts_path(self, layer: int) -> str:
        return next(path for path, module in self.layers[layer].named_modules() if is_experts(module))

    def _experts_module(self, layer: int) -> nn.Module:
        return self.layers[layer].get_submodule(self._experts_path(layer))


def _restore_buffers(model: PreTrainedModel) -> None:
    """Give the non-persistent buffers of a meta model (rotary frequencies) their real values."""
    for module in model.modules():
        buffers = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        if volatile := [name for name in buffers if name in module._non_persistent_buffers_set]:
            for name in volatile:
                module._buffers[name] = torch.zeros_like(module._buffers[name], device="cpu")
            model._init_weights(module)
