"""The source model, read a layer at a time: a skeleton on the meta device and a folder of safetensors shards.

Nothing here holds more than what is asked for. Block-quantized sources (FP8 as DeepSeek-V3 stores it, MXFP4 as GPT-OSS
does) are dequantized on the way; other quantized sources are refused by name.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # tokenizer and generation files


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, from its shard's header."""

    file: str
    dtype: str  # safetensors name
    shape: tuple[int, ...]


class Checkpoint:
    """A folder of safetensors shards: every tensor by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file, expected in self._files().items():
            path = folder / file
            if not path.is_file():
                raise InputError(f"{file}: missing, expected the shard that {INDEX} names in {folder}")
            try:
                with safe_open(path, "pt") as shard:
                    for name in shard.keys():  # noqa: SIM118  a safe_open handle is no mapping
                        view = shard.get_slice(name)
                        self.entries[name] = Entry(file, view.get_dtype(), tuple(view.get_shape()))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from error
            if lost := sorted(expected - self.entries.keys()):
                raise InputError(f"{file}: tensor {lost[0]} is missing, {INDEX} says that it is there")

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

    @contextmanager
    def reading(self) -> Iterator[Callable[..., Tensor]]:
        """A function `read(name, index=())` on memory-mapped shards, which are unmapped when the block ends."""
        handles: dict[str, Any] = {}

        def raw(name: str, index: tuple = ()) -> Tensor:
            entry = self.entry(name)
            if entry.file not in handles:
                handles[entry.file] = safe_open(self.folder / entry.file, "pt")
            view = handles[entry.file]
            return view.get_slice(name)[index] if index else view.get_tensor(name)

        def read(name: str, index: tuple = ()) -> Tensor:
            if name not in self.entries and f"{name}_blocks" in self.entries:
                return dequantize_mxfp4(raw(f"{name}_blocks", index), raw(f"{name}_scales", index))
            if self.entry(name).dtype.startswith("F8"):
                return dequantize_fp8(raw(name), raw(f"{name}_scale_inv"))[index or ...]
            return raw(name, index)

        try:
            yield read
        finally:
            handles.clear()

    def entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise InputError(f"{name}: no such tensor in {self.folder}, the model's configuration needs it") from None

    def check_finite(self, file: str) -> None:
        """Raise InputError naming the first tensor of a shard that holds NaN or infinity."""
        with safe_open(self.folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    raise InputError(f"{name}: holds NaN or infinity in {file}, expected finite weights")


def dequantize_fp8(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """DeepSeek-V3 blocks: float8 [O, I] times float32 scale_inv [ceil(O / 128), ceil(I / 128)] -> bfloat16."""
    O, I = weight.shape
    rows, columns = -(-O // scale_inv.shape[0]), -(-I // scale_inv.shape[1])
    block = 1 << (max(rows, columns) - 1).bit_length()  # the last block of a dimension may be cut off
    scale = scale_inv.repeat_interleave(block, 0)[:O].repeat_interleave(block, 1)[:, :I]
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
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise InputError(f"quantization_config: quant_method {method!r}, expected an unquantized, fp8 or mxfp4 source")
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
        self.checkpoint = Checkpoint(folder)
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
        if unknown := [s.name for e in self.sources.values() for s in e if not self._stored(s.name)]:
            raise InputError(
                f"{unknown[0]}: no such tensor in {folder} ({len(unknown)} are missing), the config needs it"
            )
        for name, entry in self.checkpoint.entries.items():
            if entry.dtype.startswith("F8") and f"{name}_scale_inv" not in self.checkpoint.entries:
                raise InputError(f"{name}: {entry.dtype} without {name}_scale_inv, expected FP8 blocks with scales")

    def _stored(self, name: str) -> bool:
        return name in self.checkpoint.entries or f"{name}_blocks" in self.checkpoint.entries

    @property
    def hidden_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What unquantized tensors are stored in."""
        stored = self.checkpoint.entries.get(f"{self.embedding_name}.weight")
        names = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
        return names.get(stored.dtype if stored else "BF16", torch.bfloat16)

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
        with self.checkpoint.reading() as read:
            if entries[0].index == ():
                tensor = read(entries[0].name, () if index is None else (index,))
                return tensor.to(dtype or tensor.dtype, copy=True)
            experts = range(*(index or slice(None)).indices(1 + max(int(e.index[0]) for e in entries)))
            shape = self.model.get_parameter_or_buffer(parameter).shape
            fused: Tensor | None = None
            for entry in entries:
                expert, *rest = entry.index
                if expert not in experts:
                    continue
                part = read(entry.name)
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

    def expert_tensors(self, layer: int, experts: slice, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A run of a layer's experts in canonical layout: gate_up [n, 2M, H], down [n, H, M] and their biases."""
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
