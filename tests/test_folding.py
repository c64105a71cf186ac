"""Folding gains, rotating the residual stream and mixing channel pairs must not change what a model computes."""

from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, random_model, random_tokens
from sources import write_source
from torch.overrides import TorchFunctionMode

from codequant.discovery import describe_norm
from codequant.errors import InputError
from codequant.folding import fold_experts, fold_layer, fold_norm, fold_reader, gain_of, head_blocks, mix_pair
from codequant.rotation import hadamard_start, householder_to
from codequant.source import SourceModel
from codequant.structure import Norm


def random_orthogonal(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def random_mix(block: int, linear: bool, seed: int) -> torch.Tensor:
    if linear:
        return random_orthogonal(block, seed)
    order = torch.randperm(block, generator=torch.Generator().manual_seed(seed))
    return torch.eye(block, dtype=torch.float64)[:, order]


class Float64(TorchFunctionMode):
    """Models cast to float32 inside norms, routers and softmax; here every such cast is to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        args, kwargs = tuple(map(wider, args)), {k: wider(v) for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


@torch.no_grad()
def transform(model, source: SourceModel) -> None:
    """Fold, rotate, mix heads and permute a float64 model in place with random matrices."""
    H = source.hidden_size
    rotation = random_orthogonal(H, 3)
    if any(norm.centered for structure in source.structures for norm in structure.norms):
        rotation = hadamard_start(rotation, torch.ones(H), seed=0)
    parameters = dict(model.named_parameters())
    for i, structure in enumerate(source.structures):
        prefix = f"{source.layer_names[i]}."
        inside = f"{structure.experts.path}." if structure.experts else None
        tensors = {
            name.removeprefix(prefix): p.data
            for name, p in parameters.items()
            if name.startswith(prefix) and not (inside and name.removeprefix(prefix).startswith(inside))
        }
        folded = fold_layer(tensors, structure, rotation)
        for k, pair in enumerate(structure.pairs):
            mixes = [random_mix(pair.block, pair.linear, 10 * k + b) for b in range(len(head_blocks(pair)))]
            mix_pair(folded, pair, mixes)
        if structure.experts:
            fold_fused(model.get_submodule(prefix + structure.experts.path), structure, tensors, rotation)
        for path, tensor in folded.items():
            parameters[prefix + path].data.copy_(tensor)
    norm = describe_norm(source.norm_name, source.model.get_submodule(source.norm_name))
    ends = {name: p.data for name, p in parameters.items() if name.startswith(f"{source.norm_name}.")}
    gain = gain_of(norm, ends)
    head = parameters[f"{source.head_name}.weight"].data
    head.copy_(fold_reader(head, gain, rotation))
    embedding = parameters[f"{source.embedding_name}.weight"].data
    embedding.copy_(embedding @ rotation)
    fold_norm(norm, ends, rotation)
    for name, tensor in ends.items():
        parameters[name].data.copy_(tensor)


def fold_fused(module, structure, tensors, rotation) -> None:
    """Fold and permute the fused experts of a transformers module, through the canonical layout and back."""
    flags, gate_up, down = structure.experts, module.gate_up_proj.data, module.down_proj.data
    bias, up_bias = getattr(module, "down_proj_bias", None), getattr(module, "gate_up_proj_bias", None)
    if flags.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gain = gain_of(structure.experts_norm, tensors)
    gate_up, down, folded_bias = fold_experts(gate_up, down, None if bias is None else bias.data, gain, rotation)
    M = flags.intermediate
    order = torch.stack([torch.randperm(M, generator=torch.Generator().manual_seed(e)) for e in range(len(down))])
    for e, columns in enumerate(order):  # the pair inside an expert: rows of gate and up, columns of down
        rows = (
            torch.cat((columns, columns + M))
            if flags.is_concatenated
            else (2 * columns[:, None] + torch.arange(2)).flatten()
        )
        gate_up[e], down[e] = gate_up[e][rows], down[e][:, columns]
        if up_bias is not None:
            up_bias.data[e] = up_bias.data[e][rows]
    module.gate_up_proj.data.copy_(gate_up.transpose(1, 2) if flags.is_transposed else gate_up)
    module.down_proj.data.copy_(down.transpose(1, 2) if flags.is_transposed else down)
    if bias is not None:
        bias.data.copy_(folded_bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_rotate_and_permute_keep_float64_logits(family: str, tmp_path: Path) -> None:
    source = SourceModel(write_source(family, tmp_path / "source"))
    assert not any(structure.obstacles for structure in source.structures)
    model = random_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    tokens = random_tokens(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), Float64():
        before = model(tokens).logits
    transform(model, source)
    with torch.no_grad(), Float64():
        after = model(tokens).logits
    changed = [name for name, p in model.named_parameters() if p.ndim > 1 and not torch.equal(p, weights[name])]
    assert len(changed) > 4 * source.num_layers, "the transformation did nothing"
    assert (after - before).abs().max() / before.abs().max() < 1e-9


def test_a_zero_gain_beside_a_bias_is_named() -> None:
    norm = Norm("input_layernorm", centered=True, unit_offset=False, has_bias=True)
    tensors = {"input_layernorm.weight": torch.tensor([1.0, 0.0]), "input_layernorm.bias": torch.ones(2)}
    with pytest.raises(InputError, match="input_layernorm: gain 0 in channel 1"):
        gain_of(norm, tensors)


def test_householder_maps_source_to_target() -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(7, dtype=torch.float64), dim=0) for _ in range(2))
    reflection = householder_to(a, b)
    assert torch.allclose(reflection @ a, b)
    assert torch.allclose(reflection @ reflection, torch.eye(7, dtype=torch.float64))
    assert torch.equal(householder_to(a, a), torch.eye(7, dtype=torch.float64))
