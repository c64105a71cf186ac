"""GGUF for llama.cpp: every quantized matrix as Q8_0, bit for bit the codebook model.

Q8_0 stores 32 int8 values with one float16 scale, value = scale * int8. A codebook weight is just that, its int8 entry
times the float16 step of its row group, wherever a block of 32 columns lies in one group. What was not quantized keeps
its type, but norms and routers become float32, as llama.cpp expects.

    block_q8_0: float16 scale, int8 value[32]; 34 bytes; a row of I columns is I / 32 blocks (ggml-common.h)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from codequant.errors import InputError
from codequant.export.folder import QuantizedFolder, Read
from codequant.export.gguf_tokenizer import add_tokenizer
from codequant.packing import PackedWeight, unpack, unpack_indices

try:
    from gguf import (
        MODEL_ARCH,
        MODEL_ARCH_NAMES,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        get_tensor_name_map,
    )
except ImportError as error:
    raise InputError("gguf: not installed, needed to write GGUF files: pip install 'codequant[gguf]'") from error

BLOCK = 32
TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
ATTENTION = re.compile(r".*\.self_attn\.(q|k)_proj\.weight")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names and computes a family."""

    arch: MODEL_ARCH
    interleaved_rope: bool  # rotates pairs of neighbouring channels, where transformers rotates halves
    required: dict[str, tuple[Any, ...]]  # fields of the configuration that llama.cpp takes for granted
    expert_width: Callable[[PretrainedConfig], int]


ARCHITECTURES = {
    "qwen3_moe": Architecture(
        MODEL_ARCH.QWEN3MOE,
        interleaved_rope=False,
        required={
            "hidden_act": ("silu",),
            "norm_topk_prob": (True,),
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "mlp_only_layers": ([], None),
            "decoder_sparse_step": (1,),
        },
        expert_width=lambda config: config.moe_intermediate_size,
    ),
    "mixtral": Architecture(
        MODEL_ARCH.LLAMA,
        interleaved_rope=True,
        required={"hidden_act": ("silu",), "sliding_window": (None,)},
        expert_width=lambda config: config.intermediate_size,
    ),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: a checkpoint tensor, or one per expert stacked."""

    name: str
    parts: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int | None  # attention heads whose rows change from halves to neighbouring pairs

    @property
    def byte_shape(self) -> tuple[int, ...]:
        *rows, columns = self.shape
        if self.type == GGMLQuantizationType.Q8_0:
            return (*rows, columns // BLOCK * (2 + BLOCK))
        return (*rows, columns * (4 if self.type == GGMLQuantizationType.F32 else 2))


def write(folder: Path, out: Path) -> None:
    """Write the file `out`. Tensors pass through memory one at a time."""
    model = QuantizedFolder(folder)
    architecture = check_config(model.config)
    entries = plan(model, architecture)
    writer = GGUFWriter(out, MODEL_ARCH_NAMES[architecture.arch])
    add_config(writer, model.config, architecture)
    add_tokenizer(writer, folder, model.config.vocab_size)
    for entry in entries:
        shape = entry.byte_shape
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=entry.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(tensor_bytes(entry, model.read).numpy())
    finally:
        writer.close()


def check_config(config: PretrainedConfig) -> Architecture:
    """Raises InputError naming the first field for which llama.cpp would compute something else."""
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"model_type: {config.model_type!r} has no GGUF export, expected one of {[*ARCHITECTURES]}")
    architecture = ARCHITECTURES[config.model_type]
    for field, allowed in architecture.required.items():
        value = getattr(config, field, allowed[0])
        if value not in allowed:
            raise InputError(f"{field}: {value!r}, but llama.cpp computes {config.model_type} with {allowed[0]!r}")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise InputError(f"rope_type: {rope_type!r} has no GGUF export, expected 'default'")
    return architecture


def add_config(writer: GGUFWriter, config: PretrainedConfig, architecture: Architecture) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(architecture.expert_width(config))
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def plan(model: QuantizedFolder, architecture: Architecture) -> list[Entry]:
    """Every tensor of the file, or InputError naming the first one that GGUF cannot hold."""
    config = model.config
    names = get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    groups: dict[str, list[str]] = {}  # GGUF name -> checkpoint tensors
    for name in sorted(model.names, key=_natural):
        key = EXPERT.sub(r"\1.\3.weight", name)
        translated = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if translated is None:
            raise InputError(f"{name}: llama.cpp has no such tensor in a {config.model_type} model")
        groups.setdefault(translated, []).append(name)

    entries = []
    for translated, parts in groups.items():
        kinds = [tensor_type(model, part) for part in parts]
        if len(set(kinds)) > 1:
            odd = next(part for part, kind in zip(parts, kinds) if kind != kinds[0])
            raise InputError(f"{odd}: quantized unlike {parts[0]}, but GGUF stores both in the one tensor {translated}")
        stacked = EXPERT.fullmatch(parts[0]) is not None
        shape = model.shape(parts[0])
        attention = ATTENTION.fullmatch(parts[0]) if architecture.interleaved_rope else None
        heads = None
        if attention:
            heads = config.num_attention_heads if attention[1] == "q" else config.num_key_value_heads
        entries.append(
            Entry(translated, tuple(parts), stacked, (len(parts), *shape) if stacked else shape, kinds[0], heads)
        )
    return entries


def tensor_type(model: QuantizedFolder, name: str) -> GGMLQuantizationType:
    """The GGUF type that holds a tensor exactly. Raises InputError where there is none."""
    scheme = model.scheme(name)
    is_router = name.endswith(".gate.weight")
    if scheme is None:
        stored = model.checkpoint.entry(name).dtype
        if stored not in TYPES:
            raise InputError(f"{name}: type {stored}, expected one of {[*TYPES]}")
        return GGMLQuantizationType.F32 if is_router or len(model.shape(name)) == 1 else TYPES[stored]
    if scheme.hadamard:
        raise InputError(f"{name}: needs an online Hadamard transform, which llama.cpp does not compute; use bf16")
    if is_router:
        return GGMLQuantizationType.F32
    columns = model.matrices[name].in_features
    group = columns if scheme.group_size == -1 else scheme.group_size
    if group % BLOCK:
        raise InputError(f"{name}: {group} columns share a codebook, expected a multiple of {BLOCK} (a Q8_0 block)")
    return GGMLQuantizationType.Q8_0


def tensor_bytes(entry: Entry, read: Read) -> Tensor:
    """uint8 of `entry.byte_shape`."""
    parts = [_rows(read(part), entry.type) for part in entry.parts]
    if entry.heads is not None:
        parts = [halves_to_pairs(part, entry.heads) for part in parts]
    return torch.stack(parts) if entry.stacked else parts[0]


def _rows(weight: Tensor | PackedWeight, type: GGMLQuantizationType) -> Tensor:
    """The bytes of every row, uint8 [..., bytes]."""
    if isinstance(weight, PackedWeight) and type == GGMLQuantizationType.Q8_0:
        return q8_0(weight)
    plain = unpack(weight) if isinstance(weight, PackedWeight) else weight
    return (plain.float() if type == GGMLQuantizationType.F32 else plain).contiguous().view(torch.uint8)


def q8_0(weight: PackedWeight) -> Tensor:
    """The blocks of every row: uint8 [..., O, I / 32 * 34]. The group size must be a multiple of 32."""
    G = weight.codebook.shape[-2]
    indices = unpack_indices(weight.packed, weight.bits, weight.in_features).unflatten(-1, (G, -1))
    entries = weight.codebook.gather(-1, indices.long()).flatten(-2)  # int8 [..., O, I]
    scale = weight.step.repeat_interleave(weight.group_size // BLOCK, dim=-1).unsqueeze(-1)  # [..., O, I / 32, 1]
    values = entries.view(torch.uint8).unflatten(-1, (-1, BLOCK))
    return torch.cat((scale.view(torch.uint8), values), dim=-1).flatten(-2)


def halves_to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] of q or k: channels i and i + D/2, rotated together by transformers, become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _natural(name: str) -> list[int | str]:
    """Sorts experts.2 before experts.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
