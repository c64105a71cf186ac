"""Modules that hold a matrix, a layer's experts or a router in the format, and compute on it through the backend.

Each takes the place of a module of the model's own. Until its first forward it holds the tensors of the format, as
buffers, so that transformers can load, move and save them; then the backend turns them into the layout its kernels
want (`Backend.prepare_*`) and they are dropped: two copies of the weights would defeat the purpose. Saving, moving or
copying asks the backend for them again (`Backend.restore`), bit for bit.

Letters: T tokens, E experts, P projections in one fused weight (gate and up: 2), O output and I input channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from codequant import packing
from codequant.errors import InputError
from codequant.hadamard import hadamard_transform
from codequant.kernels import backend
from codequant.kernels.reference import FULL_PRECISION, ExpertWeights, fake_quantize, join
from codequant.packing import PackedParts, PackedWeight
from codequant.quantization_config import Scheme


class CodebookModule(nn.Module):
    """A module with tensors of the format and, from its first forward on, only what the backend made of them."""

    _prepared: Any = None

    def _prepare(self) -> Any:
        """Hand the tensors of the format over to the backend and drop them."""
        raise NotImplementedError

    def _restore(self) -> dict[str, Tensor]:
        """The tensors that `_prepare` dropped, by buffer name."""
        raise NotImplementedError

    def prepared(self) -> Any:
        if self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    def unprepare(self) -> None:
        """Back to the tensors of the format."""
        if self._prepared is not None:
            for name, tensor in self._restore().items():
                self.register_buffer(name, tensor)
            self._prepared = None

    def _backend(self) -> Any:
        return backend(next(self.buffers(recurse=False)).device.type)

    def _register_matrix(self, stem: str, shapes: dict[str, tuple[int, ...]]) -> None:
        for suffix, shape in shapes.items():
            self.register_buffer(f"{stem}_{suffix}", torch.empty(shape, dtype=packing.DTYPES[suffix]))

    def _matrix(self, stem: str, in_features: int) -> PackedWeight:
        packed, codebook, step = (getattr(self, f"{stem}_{suffix}") for suffix in packing.SUFFIXES)
        return PackedWeight(packed, codebook, step, in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodebookModule":
        # What a backend prepared belongs to one device. And `model.to(torch.bfloat16)` must not round the steps: fn
        # sees their bits as integers.
        self.unprepare()
        steps = {id(tensor) for name, tensor in self._buffers.items() if name.endswith("_step")}
        return super()._apply(
            lambda t: fn(t.view(torch.int16)).view(torch.float16) if id(t) in steps else fn(t), recurse
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._prepared is not None:
            destination.update({prefix + name: tensor for name, tensor in self._restore().items()})

    def __getstate__(self) -> Any:
        # A prepared form may own memory outside torch, which deepcopy and pickle cannot see.
        self.unprepare()
        return super().__getstate__()


def _stored(weight: PackedWeight, stem: str) -> dict[str, Tensor]:
    return {f"{stem}_{suffix}": getattr(weight, suffix) for suffix in packing.SUFFIXES}


class CodebookLinear(CodebookModule):
    """nn.Linear with a quantized weight [O, I]."""

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self._dtype = dtype
        self._register_matrix("weight", packing.shapes(out_features, in_features, scheme.bits, scheme.group_size))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every read: for model code that initializes it, asks for its dtype, or
        multiplies with it instead of calling the module (that product's input is then not quantized)."""
        if self._prepared is None:
            stored = self._matrix("weight", self.in_features)
        else:
            prepared, kernels = self._prepared
            stored = kernels.restore(prepared)
        return packing.unpack(stored).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in x's dtype."""
        prepared, kernels = self.prepared()
        scheme = self.scheme
        y = hadamard_transform(x) if scheme.hadamard else x
        return kernels.linear(y, prepared, self.bias, scheme.activation_bits, scheme.activation_clip).to(x.dtype)

    def _prepare(self) -> Any:
        kernels = self._backend()
        prepared = kernels.prepare_linear(self._matrix("weight", self.in_features))
        for name in list(self._buffers):
            delattr(self, name)
        return prepared, kernels

    def _restore(self) -> dict[str, Tensor]:
        prepared, kernels = self._prepared
        return _stored(kernels.restore(prepared), "weight")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint that fills an experts' parameter, or an expert's share of it."""

    stem: str  # buffer name, or what it starts with where there are three
    module: str  # checkpoint module, for messages
    shape: tuple[int, ...]  # of the plain tensor
    fused: bool  # it fills the whole parameter, all experts
    scheme: Scheme | None = None  # None: plain


class CodebookExperts(CodebookModule):
    """The experts of one layer with a quantized gate_up, down or both, for every layout of transformers' fused experts.

    Buffers are the checkpoint's own tensors, one per expert and projection where it has them; the fused canonical form
    (`ExpertWeights`: rows are output channels, gate before up) exists only in what the backend prepared. Experts of one
    layer may have different bits: narrow codebooks are widened by repeating their last entry, which no index reaches.
    """

    def __init__(self, original: Any, parts: dict[str, list[Part]], dtype: torch.dtype) -> None:
        """`original` gives the activation and the layout flags; `parts` the tensors of its parameters, by name, in the
        order in which they fill it."""
        super().__init__()
        if getattr(original, "has_post_expert_norm", False):
            raise InputError(f"{parts['down_proj'][0].module}: experts with a norm after down are not supported")
        self.num_experts: int = original.num_experts
        self.has_gate: bool = original.has_gate
        self.is_transposed: bool = original.is_transposed
        self.interleaved: bool = original.has_gate and not original.is_concatenated
        self.act_fn = getattr(original, "act_fn", None)
        self._original_gate: Callable[[Tensor], Tensor] = original._apply_gate if self.has_gate else original.act_fn
        plain_gate = type(original)._apply_gate.__name__ == "_default_apply_gate"
        is_silu = type(self.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self._activation = "silu" if self.has_gate and plain_gate and is_silu else None
        self._parts = parts
        self._gate_up = "gate_up_proj" if self.has_gate else "up_proj"
        self.input_scheme, self.down_scheme = (_common_scheme(parts[name]) for name in (self._gate_up, "down_proj"))
        for part in (p for entries in parts.values() for p in entries):
            if part.scheme is None:
                self.register_buffer(part.stem, torch.empty(part.shape, dtype=dtype))
                continue
            *experts, O, I = part.shape
            if self.is_transposed:
                O, I = I, O
            shapes = packing.shapes(O, I, part.scheme.bits, part.scheme.group_size)
            self._register_matrix(part.stem, {suffix: (*experts, *shape) for suffix, shape in shapes.items()})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, I], top_k_* [T, k] -> [T, O] in hidden_states' dtype."""
        prepared, kernels = self.prepared()
        x = hadamard_transform(hidden_states) if self.input_scheme.hadamard else hidden_states
        return kernels.experts(x, top_k_index, top_k_weights, prepared).to(hidden_states.dtype)

    def apply_gate(self, x: Tensor) -> Tensor:
        """[T, 2M], gate before up (or [T, M] without a gate) -> [T, M], by the model's own function."""
        if self.interleaved:
            x = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
        return self._original_gate(x)

    def _prepare(self) -> Any:
        kernels = self._backend()
        weights = ExpertWeights(
            gate_up=self._assemble(self._gate_up),
            down=self._assemble("down_proj"),
            apply_gate=self.apply_gate,
            activation=self._activation,
            has_gate=self.has_gate,
            gate_up_bias=self._assemble_bias(f"{self._gate_up}_bias"),
            down_bias=self._assemble_bias("down_proj_bias"),
            input_bits=self.input_scheme.activation_bits,
            input_clip=self.input_scheme.activation_clip,
            down_bits=self.down_scheme.activation_bits,
            down_clip=self.down_scheme.activation_clip,
            down_transform=hadamard_transform if self.down_scheme.hadamard else None,
        )
        for name in list(self._buffers):
            delattr(self, name)
        return kernels.prepare_experts(weights), kernels

    def _restore(self) -> dict[str, Tensor]:
        prepared, kernels = self._prepared
        weights: ExpertWeights = kernels.restore(prepared)
        return {
            **self._disassemble(self._gate_up, join(weights.gate_up)),
            **self._disassemble("down_proj", join(weights.down)),
            **self._disassemble(f"{self._gate_up}_bias", weights.gate_up_bias),
            **self._disassemble("down_proj_bias", weights.down_bias),
        }

    def _assemble(self, parameter: str) -> PackedWeight | PackedParts | Tensor:
        """The canonical [E, O, I] of a parameter: its parts as they are, where they come in order."""
        parts = self._parts[parameter]
        if parts[0].scheme is None:
            plain = self._join(parts, [getattr(self, part.stem) for part in parts])
            return self._canonical_rows(parameter, plain.mT if self.is_transposed else plain).contiguous()
        bits = max(part.scheme.bits for part in parts if part.scheme is not None)
        in_features = parts[0].shape[-2 if self.is_transposed else -1]
        weights = [_widen(self._matrix(part.stem, in_features), bits) for part in parts]
        stored = weights[0] if parts[0].fused else PackedParts(weights, self.num_experts)
        if not self._in_turn(parameter):
            return stored
        whole = join(stored)
        packed, codebook, step = (
            self._canonical_rows(parameter, getattr(whole, suffix)) for suffix in packing.SUFFIXES
        )
        return PackedWeight(packed, codebook, step, in_features)

    def _assemble_bias(self, parameter: str) -> Tensor | None:
        """The canonical [E, O], or None where the experts have no bias."""
        if parameter not in self._parts:
            return None
        parts = self._parts[parameter]
        return self._canonical_rows(parameter, self._join(parts, [getattr(self, part.stem) for part in parts]))

    def _disassemble(self, parameter: str, weight: PackedWeight | Tensor | None) -> dict[str, Tensor]:
        """Inverse of `_assemble` and `_assemble_bias`: buffer name -> tensor with a storage of its own."""
        if weight is None:
            return {}
        parts = self._parts[parameter]
        if isinstance(weight, Tensor):
            plain = self._checkpoint_rows(parameter, weight)
            split = self._split(parts, plain.mT if self.is_transposed and plain.ndim == 3 else plain)
            return {part.stem: tensor for part, tensor in zip(parts, split)}
        fields = (
            self._split(parts, self._checkpoint_rows(parameter, getattr(weight, suffix))) for suffix in packing.SUFFIXES
        )
        found: dict[str, Tensor] = {}
        for part, packed, codebook, step in zip(parts, *fields):
            assert part.scheme is not None  # all parts of a parameter are quantized, or none
            one = PackedWeight(packed, codebook, step, weight.in_features)
            found |= _stored(_narrow(one, part.scheme.bits), part.stem)
        return found

    def _join(self, parts: list[Part], tensors: list[Tensor]) -> Tensor:
        """Tensors [rows, ...] of every expert and projection, in this order -> [E, P * rows, ...]."""
        return tensors[0] if parts[0].fused else torch.cat(tensors).unflatten(0, (self.num_experts, -1))

    def _split(self, parts: list[Part], joined: Tensor) -> list[Tensor]:
        if parts[0].fused:
            return [joined.contiguous()]
        return [tensor.clone() for tensor in joined.flatten(0, 1).chunk(len(parts))]

    def _in_turn(self, parameter: str) -> bool:
        """Whether the parameter has gate and up rows in turn."""
        return self.interleaved and not parameter.startswith("down")

    def _canonical_rows(self, parameter: str, tensor: Tensor) -> Tensor:
        """[E, O, ...] with gate and up rows in turn -> all gate rows, then all up rows."""
        if not self._in_turn(parameter):
            return tensor
        return torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)

    def _checkpoint_rows(self, parameter: str, tensor: Tensor) -> Tensor:
        if not self._in_turn(parameter):
            return tensor
        return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


def _common_scheme(parts: list[Part]) -> Scheme:
    """What the parts of one parameter share; bits may differ and mean nothing in the result."""
    first = parts[0]
    for part in parts:
        if (part.scheme is None) != (first.scheme is None):
            plain, quantized = (part, first) if part.scheme is None else (first, part)
            raise InputError(f"{plain.module}: ignored, but {quantized.module} is quantized; expected all or none")
        if part.scheme is not None and first.scheme is not None:
            common = replace(part.scheme, bits=first.scheme.bits)
            if common != first.scheme:
                raise InputError(
                    f"{part.module}: {common}, expected {first.scheme} as {first.module} (bits may differ)"
                )
    return first.scheme or Scheme(activation_bits=FULL_PRECISION)


def _widen(weight: PackedWeight, bits: int) -> PackedWeight:
    """The same matrix with larger codebooks, their last entry repeated; indices keep their values."""
    if weight.bits == bits:
        return weight
    indices = packing.unpack_indices(weight.packed, weight.bits, weight.in_features)
    K = weight.codebook.shape[-1]
    repeated = weight.codebook[..., -1:].expand(*weight.codebook.shape[:-1], 2**bits - K)
    codebook = torch.cat((weight.codebook, repeated), dim=-1)
    return PackedWeight(packing.pack_indices(indices, bits), codebook, weight.step, weight.in_features)


def _narrow(weight: PackedWeight, bits: int) -> PackedWeight:
    """Inverse of `_widen`."""
    if weight.bits == bits:
        return weight
    indices = packing.unpack_indices(weight.packed, weight.bits, weight.in_features)
    codebook = weight.codebook[..., : 2**bits].contiguous()
    return PackedWeight(packing.pack_indices(indices, bits), codebook, weight.step, weight.in_features)


class CodebookWeight(CodebookModule):
    """Mixed into a module that multiplies with `self.weight` [O, I] in a forward of its own, such as a router.

    The weight becomes a property, dequantized in the dtype of the input, and the input is quantized on the way in.
    There is no kernel to call: such matrices are small.
    """

    in_features: int
    scheme: Scheme

    @property
    def weight(self) -> Tensor:
        # Not kept outside forward: as it loads, transformers writes initial values through this property.
        return self._prepare() if self._prepared is None else self._prepared

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hadamard_transform(hidden_states) if self.scheme.hadamard else hidden_states
        x = fake_quantize(x, self.scheme.activation_bits, self.scheme.activation_clip).to(hidden_states.dtype)
        if self.prepared().dtype != x.dtype:
            self._prepared = self.prepared().to(x.dtype)
        return super().forward(x, *args, **kwargs)

    def _prepare(self) -> Tensor:
        return packing.unpack(self._matrix("weight", self.in_features))

    def _restore(self) -> dict[str, Tensor]:
        return {}  # nothing was dropped


def quantize_weight_of(module: Any, scheme: Scheme) -> None:
    """Turn a module with a parameter `weight` [O, I] and its own forward into one with a quantized weight, in place."""
    out_features, in_features = module.weight.shape
    del module.weight
    cls: Any = type(module)
    module.__class__ = _with_codebook_weight(cls)
    module.in_features, module.scheme = in_features, scheme
    module._register_matrix("weight", packing.shapes(out_features, in_features, scheme.bits, scheme.group_size))


@cache
def _with_codebook_weight(cls: type) -> type[nn.Module]:
    return type(f"Codebook{cls.__name__}", (CodebookWeight, cls), {})
