"""The `codequant` quantization method of vLLM (written for vLLM 0.32).

Packed weights stay packed: every linear layer and every layer's experts hold what the kernel backend of the device made
of them. With CODEQUANT_VLLM_MODE=load they are dequantized once, at load, and the readable reference computes with
them: more memory, slower, and the result to compare others with.

A checkpoint tensor reaches a layer through the `weight_loader` of one of its parameters. The loaders here know the
checkpoint's own names, which vLLM merges (`q_proj`, `k_proj`, `v_proj` -> `qkv_proj`), so the patterns of config.json
mean the same as everywhere. Under tensor parallelism a row-parallel layer quantizes its own piece of the input, with
the range of that piece: finer than the whole row, so results differ a little from one rank to several.

Letters: T tokens, E experts on this rank, M intermediate channels on this rank, O output and I input channels.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmQuantizationConfig

from codequant import packing
from codequant.checkpoint_names import matrices, parameter_sources, skeleton
from codequant.errors import InputError
from codequant.hadamard import hadamard_transform
from codequant.kernels import backend, reference
from codequant.kernels.reference import FULL_PRECISION, ExpertWeights, fake_quantize
from codequant.packing import PackedWeight
from codequant.quantization_config import QUANT_METHOD, QuantizationConfig, Scheme
from codequant.serving.shards import Piece, cut
from codequant.source import SIDE_FILES
from codequant.verification import check_tensors, read_config

MODE = "CODEQUANT_VLLM_MODE"
MODES = ("packed", "load")
# How vLLM merges layers. A model's own table comes on top; that of Qwen3-MoE reaches us without the second line.
MERGED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
# vLLM gives routers and the head no quantization method: their tensors would be dropped without a word.
NEVER_QUANTIZED = ("gate", "shared_expert_gate", "lm_head")


def mode() -> str:
    chosen = os.environ.get(MODE, MODES[0])
    if chosen not in MODES:
        raise InputError(f"{MODE}: {chosen!r}, expected one of {MODES}")
    return chosen


@register_quantization_config(QUANT_METHOD)
class CodequantConfig(VllmQuantizationConfig):
    """Chooses the method of every layer. vLLM pickles it to its workers."""

    def __init__(self, config: QuantizationConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizable: frozenset[str] = frozenset()  # the checkpoint's modules
        mode()  # fails early

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CodequantConfig":
        return cls(QuantizationConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the folder before any layer is built: vLLM leaves a missing tensor of a quantized model as it is."""
        folder = Path(model_name)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(model_name, revision=revision, allow_patterns=[*SIDE_FILES, "*.safetensors"])
            )
        check_tensors(folder)
        config, _ = read_config(folder)
        model = skeleton(config)
        found = matrices(model, parameter_sources(model))
        self.quantizable = frozenset(matrix.source.module for matrix in found.values())
        for module in sorted(self.quantizable):
            if module.rpartition(".")[2] in NEVER_QUANTIZED and self.config.scheme(module) is not None:
                raise InputError(f"{module}: quantized, which vLLM cannot serve; expected a match in 'ignore'")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            parent, _, name = prefix.rpartition(".")
            parts = (MERGED | self.packed_modules_mapping).get(name, [name])
            modules = [f"{parent}.{part}" for part in parts]
            schemes = self.schemes(modules)
            return UnquantizedLinearMethod() if schemes is None else CodequantLinearMethod(prefix, modules, schemes)
        if isinstance(layer, RoutedExperts):
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            experts = range(layer.moe_config.num_logical_experts)
            modules = [f"{prefix}.{expert}.{name}" for name in names for expert in experts]
            schemes = self.schemes(modules, len(experts) * 2)
            return None if schemes is None else CodequantExpertsMethod(layer, prefix, modules, schemes)
        return None

    def schemes(self, modules: list[str], split: int | None = None) -> list[Scheme] | None:
        """The schemes of modules that vLLM merges, or None where all are ignored. Raises InputError naming the one that
        differs from the others in more than bits; with `split`, modules[split:] need not agree with those before."""
        for module in modules:
            if module not in self.quantizable:
                raise InputError(f"{module}: no such matrix in the checkpoint, but vLLM's model has a layer for it")
        schemes = [self.config.scheme(module) for module in modules]
        for i, scheme in enumerate(schemes):
            if (scheme is None) != (schemes[0] is None):
                ignored, quantized = (modules[i], modules[0]) if scheme is None else (modules[0], modules[i])
                raise InputError(
                    f"{ignored}: not quantized, but vLLM computes it in one layer with {quantized}, which is"
                )
            first = schemes[split] if split is not None and i >= split else schemes[0]
            if scheme is not None and first is not None and replace(scheme, bits=first.bits) != first:
                raise InputError(f"{modules[i]}: {scheme}, expected {first} as the layers that vLLM merges with it")
        found = [scheme for scheme in schemes if scheme is not None]
        return found or None


def register_matrix(
    layer: nn.Module,
    stem: str,
    lead: tuple[int, ...],
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    loader: Callable[..., Any],
) -> None:
    """Parameters `<stem>_packed`, `_codebook` and `_step` [*lead, O, ...]; loader(suffix, parameter, tensor, ...)."""
    for suffix, shape in packing.shapes(out_features, in_features, bits, group_size).items():
        data = torch.empty(*lead, *shape, dtype=packing.DTYPES[suffix])
        parameter = nn.Parameter(data, requires_grad=False)
        # vLLM calls it with the parameter first, positionally or by name.
        parameter.weight_loader = _with_suffix(loader, suffix)  # type: ignore[attr-defined]
        layer.register_parameter(f"{stem}_{suffix}", parameter)


def _with_suffix(loader: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    def load(param: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        return loader(suffix, param, loaded_weight, *args, **kwargs)

    return load


def take_matrix(layer: nn.Module, stem: str, in_features: int) -> PackedWeight:
    """The loaded matrix, whose parameters leave the layer."""
    tensors = {suffix: getattr(layer, f"{stem}_{suffix}").data for suffix in packing.SUFFIXES}
    for suffix in packing.SUFFIXES:
        delattr(layer, f"{stem}_{suffix}")
    return PackedWeight(**tensors, in_features=in_features)


def check_columns(module: str, scheme: Scheme, in_features: int, columns: Piece) -> None:
    """Raises InputError where tensor parallelism cannot split the input of a module."""
    if columns.count == 1:
        return
    if scheme.hadamard:
        raise InputError(
            f"{module}: its online Hadamard transform needs the whole input, which tensor parallelism splits into "
            f"{columns.count}; expected --tensor-parallel-size 1 or, for experts, --enable-expert-parallel"
        )
    group = 1 if scheme.group_size == -1 else scheme.group_size
    if in_features % (columns.count * group):
        raise InputError(
            f"{module}: {in_features} input channels in groups of {group} do not split into {columns.count} pieces; "
            "expected another --tensor-parallel-size"
        )


def register_for_ops(layer: nn.Module, prefix: str) -> str:
    """Make the layer known to the custom ops below, which find it by the name returned."""
    name = f"{prefix}.{QUANT_METHOD}"
    get_current_vllm_config().compilation_config.static_forward_context[name] = layer
    return name


class CodequantLinearMethod(LinearMethodBase):
    """A linear layer, of one matrix of the checkpoint or of several stacked by rows."""

    def __init__(self, prefix: str, modules: list[str], schemes: list[Scheme]) -> None:
        self.prefix, self.modules, self.schemes = prefix, modules, schemes
        self.scheme = schemes[0]
        self.bits = max(scheme.bits for scheme in schemes)

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        pieces = input_size // input_size_per_partition
        columns = Piece(layer.tp_rank * pieces // layer.tp_size, pieces)
        check_columns(self.modules[0], self.scheme, input_size, columns)
        self.in_features, self.out_features = input_size_per_partition, sum(output_partition_sizes)
        self.dtype = params_dtype

        def load(suffix: str, parameter: nn.Parameter, tensor: Tensor, shard: int | str | None = None) -> None:
            part = "qkv".index(shard) if isinstance(shard, str) else shard or 0
            size, start = output_partition_sizes[part], sum(output_partition_sizes[:part])
            # Fewer key and value heads than ranks are replicated: a piece then serves several ranks.
            pieces = tensor.shape[0] // size
            rows = Piece(layer.tp_rank * pieces // layer.tp_size, pieces)
            piece = cut(suffix, tensor, self.schemes[part], input_size, self.bits, rows, columns)
            parameter.data.narrow(0, start, size).copy_(piece)

        register_matrix(
            layer, "weight", (), self.out_features, self.in_features, self.bits, self.scheme.group_size, load
        )
        layer.codequant_name = register_for_ops(layer, self.prefix)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        weight = take_matrix(layer, "weight", self.in_features)
        self.kernels = backend(weight.packed.device.type)
        self.prepared = (
            packing.unpack(weight).to(self.dtype) if mode() == "load" else self.kernels.prepare_linear(weight)
        )
        # Latent attention asks for the device of its up-projection by one of the names it knows.
        layer.weight_packed = nn.Parameter(weight.packed.new_empty(0), requires_grad=False)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.codequant.vllm_linear(x, bias, layer.codequant_name, self.out_features)
        return self.compute(x, bias)

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O] in x's dtype."""
        scheme = self.scheme
        # Outside a forward pass latent attention multiplies by the identity, to learn the weights.
        bits = scheme.activation_bits if is_forward_context_available() else FULL_PRECISION
        y = hadamard_transform(x) if scheme.hadamard else x
        if isinstance(self.prepared, Tensor):
            y = fake_quantize(y, bits, scheme.activation_clip).to(self.prepared.dtype)
            return F.linear(y, self.prepared, bias).to(x.dtype)
        return self.kernels.linear(y, self.prepared, bias, bits, scheme.activation_clip).to(x.dtype)


class CodequantExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer."""

    def __init__(self, layer: RoutedExperts, prefix: str, modules: list[str], schemes: list[Scheme]) -> None:
        super().__init__(layer.moe_config)
        if layer.activation != MoEActivation.SILU:
            raise InputError(f"{prefix}: activation {layer.activation.value!r}, expected 'silu'")
        if layer.apply_router_weight_on_input:
            raise InputError(f"{prefix}: router weights applied to the input, expected them on the output")
        self.prefix = prefix
        count = len(modules) // 3
        # Shard ids of vLLM's loader: w1 gate, w3 up, w2 down.
        self.schemes = {"w1": schemes[:count], "w3": schemes[count : 2 * count], "w2": schemes[2 * count :]}
        self.modules = {"w1": modules[0], "w2": modules[2 * count]}

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        E, H, M = num_experts, hidden_size, intermediate_size_per_partition
        ranks = Piece(layer.moe_config.tp_rank, layer.moe_config.tp_size)
        self.hidden_size, self.intermediate_size, self.dtype = H, M, params_dtype
        self.input_scheme, self.down_scheme = self.schemes["w1"][0], self.schemes["w2"][0]
        check_columns(self.modules["w2"], self.down_scheme, M * ranks.count, ranks)

        def bits(*shards: str) -> int:
            return max(scheme.bits for shard in shards for scheme in self.schemes[shard])

        def loader(width: int) -> Callable[..., bool]:
            def load(
                suffix: str,
                parameter: nn.Parameter,
                tensor: Tensor,
                weight_name: str,
                shard_id: str,
                expert_id: int,
                return_success: bool = False,
            ) -> bool:
                local = layer._map_global_expert_id_to_local_expert_id(expert_id)
                if local == -1:
                    return False  # another rank's
                scheme = self.schemes[shard_id][expert_id]
                target = parameter.data[local]
                if shard_id == "w2":
                    target.copy_(cut(suffix, tensor, scheme, M * ranks.count, width, columns=ranks))
                else:
                    start = 0 if shard_id == "w1" else M
                    target.narrow(0, start, M).copy_(cut(suffix, tensor, scheme, H, width, rows=ranks))
                return True

            return load

        gate_up_bits, down_bits = bits("w1", "w3"), bits("w2")
        gate_up, down = loader(gate_up_bits), loader(down_bits)
        register_matrix(layer, "w13_weight", (E,), 2 * M, H, gate_up_bits, self.input_scheme.group_size, gate_up)
        register_matrix(layer, "w2_weight", (E,), H, M, down_bits, self.down_scheme.group_size, down)
        layer.codequant_name = register_for_ops(layer, self.prefix)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        gate_up = take_matrix(layer, "w13_weight", self.hidden_size)
        down = take_matrix(layer, "w2_weight", self.intermediate_size)
        dequantizes = mode() == "load"
        self.kernels: Any = reference if dequantizes else backend(gate_up.packed.device.type)
        self.prepared = self.kernels.prepare_experts(
            ExpertWeights(
                packing.unpack(gate_up).to(self.dtype) if dequantizes else gate_up,
                packing.unpack(down).to(self.dtype) if dequantizes else down,
                apply_gate=silu_and_mul,
                input_bits=self.input_scheme.activation_bits,
                input_clip=self.input_scheme.activation_clip,
                down_bits=self.down_scheme.activation_bits,
                down_clip=self.down_scheme.activation_clip,
                down_transform=hadamard_transform if self.down_scheme.hadamard else None,
            )
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, H], topk_* [T, k] -> [T, H]; vLLM runs shared experts itself."""
        if torch.compiler.is_compiling():
            return torch.ops.codequant.vllm_experts(x, topk_weights, topk_ids, layer.codequant_name)
        return self.compute(layer, x, topk_weights, topk_ids)

    def compute(self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        index = topk_ids.long()
        if layer.expert_map is not None:
            index = layer.expert_map[index].long()
            index = torch.where(index < 0, layer.local_num_experts, index)  # other ranks' experts: past the last
        y = hadamard_transform(x).to(x.dtype) if self.input_scheme.hadamard else x
        return self.kernels.experts(y, index, topk_weights, self.prepared).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """[T, 2M], gate before up -> [T, M]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# Backends are opaque to torch.compile (prepared weights, loops over experts): it sees one op for each call.


@torch.library.custom_op("codequant::vllm_linear", mutates_args=())
def vllm_linear(x: Tensor, bias: Tensor | None, layer_name: str, out_features: int) -> Tensor:
    return get_forward_context().no_compile_layers[layer_name].quant_method.compute(x, bias)


@vllm_linear.register_fake
def _(x: Tensor, bias: Tensor | None, layer_name: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("codequant::vllm_experts", mutates_args=())
def vllm_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


@vllm_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
