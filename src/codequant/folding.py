"""Fold norm gains, the residual rotation and per-head rotations into the weights; the model's function is unchanged.

Letters: H hidden channels, O and I output and input channels of a matrix, M intermediate channels of an expert.

A norm that reads the residual stream answers gain * n(x) + bias. Its readers absorb the gain, and then the whole
stream can be expressed in another orthonormal basis R [H, H], x' = x R:

    reader    W' = (W * gain) R        y = n(x) W^T is unchanged, because n(x R) = n(x) R for an RMSNorm
    writer    W' = R^T W, b' = b R     what it adds to the stream is rotated
    norm      gain' = 1, bias' = (bias / gain) R

A LayerNorm also subtracts the mean over channels. It commutes with R exactly when R keeps the all-ones vector, so for
such models the rotation is restricted to those (see `rotation.py`); centring the writers instead would need another
norm class in every serving engine.

Everything here works on plain tensors in the dtype it is given: float32 in the pipeline, float64 in the proofs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from codequant.errors import InputError
from codequant.structure import ChannelPair, LayerStructure, Norm

Tensors = dict[str, Tensor]


def gain_of(norm: Norm, tensors: Mapping[str, Tensor]) -> Tensor:
    """The factor [H] that a norm applies to the normalized residual."""
    weight = tensors[f"{norm.path}.weight"]
    gain = weight + 1 if norm.unit_offset else weight
    if norm.has_bias and bool((gain == 0).any()):
        channel = int((gain == 0).nonzero()[0])
        raise InputError(
            f"{norm.path}: gain 0 in channel {channel} beside a bias, expected gains that can be divided out"
        )
    return gain


def fold_reader(weight: Tensor, gain: Tensor | None, rotation: Tensor | None) -> Tensor:
    """[..., O, H] -> (weight * gain) @ rotation."""
    weight = weight if gain is None else weight * gain
    return weight if rotation is None else weight @ rotation


def fold_writer(weight: Tensor, rotation: Tensor | None) -> Tensor:
    """[..., H, I] -> rotation^T @ weight. A bias [..., H] is a row of the stream: fold it with `rotate_rows`."""
    return weight if rotation is None else rotation.T @ weight


def rotate_rows(x: Tensor, rotation: Tensor | None) -> Tensor:
    """Residual vectors [..., H] in the new basis: embeddings, writers' biases, hidden states."""
    return x if rotation is None else x @ rotation


def fold_norm(norm: Norm, tensors: Tensors, rotation: Tensor | None) -> None:
    """Set the norm's own tensors to what is left after its gain has gone into the readers."""
    gain = gain_of(norm, tensors)
    if norm.has_bias:
        tensors[f"{norm.path}.bias"] = rotate_rows(tensors[f"{norm.path}.bias"] / gain, rotation)
    neutral = torch.zeros_like if norm.unit_offset else torch.ones_like
    tensors[f"{norm.path}.weight"] = neutral(gain)


def fold_layer(tensors: Mapping[str, Tensor], structure: LayerStructure, rotation: Tensor | None) -> Tensors:
    """A decoder layer's tensors (by their path in the layer; experts are folded apart) in the new basis."""
    folded = dict(tensors)
    for site in structure.sites:
        if site.norm is not None:
            gain = gain_of(site.norm, tensors)
            for reader in site.readers:
                folded[f"{reader}.weight"] = fold_reader(folded[f"{reader}.weight"], gain, rotation)
    for writer in structure.writers:
        folded[f"{writer}.weight"] = fold_writer(folded[f"{writer}.weight"], rotation)
        if (bias := folded.get(f"{writer}.bias")) is not None:
            folded[f"{writer}.bias"] = rotate_rows(bias, rotation)
    for norm in structure.norms:
        fold_norm(norm, folded, rotation)
    return folded


def fold_experts(
    gate_up: Tensor, down: Tensor, down_bias: Tensor | None, gain: Tensor | None, rotation: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Experts in canonical layout: gate_up [..., 2M, H], down [..., H, M], down_bias [..., H] or None."""
    bias = None if down_bias is None else rotate_rows(down_bias, rotation)
    return fold_reader(gate_up, gain, rotation), fold_writer(down, rotation), bias


def head_blocks(pair: ChannelPair) -> list[tuple[Tensor, list[Tensor]]]:
    """The independent blocks of a pair: (producer rows [block], the column blocks [block] that read them).

    For grouped queries several column blocks (query heads) read the rows of one value head.
    """
    blocks: dict[int, tuple[Tensor, list[Tensor]]] = {}
    columns = torch.arange(len(pair.row_of_column)).split(pair.block)
    for block in columns:
        rows = pair.row_of_column[block]
        blocks.setdefault(int(rows[0]), (rows, []))[1].append(block)
    return list(blocks.values())


def mix_pair(tensors: Tensors, pair: ChannelPair, mixes: list[Tensor]) -> None:
    """Mix the channels between producers and consumer: for block b, columns W <- W Q_b and rows V <- Q_b^T V.

    mixes: one orthogonal matrix [block, block] per entry of `head_blocks(pair)`; a permutation matrix if the pair is
    not linear.
    """
    consumer = tensors[f"{pair.consumer}.weight"].clone()
    producers = {p: tensors[f"{p}.weight"].clone() for p in pair.producers}
    biases = {p: tensors[f"{p}.bias"].clone() for p in pair.producers if f"{p}.bias" in tensors}
    for (rows, column_blocks), mix in zip(head_blocks(pair), mixes, strict=True):
        mix = mix.to(consumer)
        for columns in column_blocks:
            consumer[:, columns] = consumer[:, columns] @ mix
        for weight in producers.values():
            weight[rows] = mix.T @ weight[rows]
        for bias in biases.values():
            bias[rows] = bias[rows] @ mix
    tensors[f"{pair.consumer}.weight"] = consumer
    tensors |= {f"{p}.weight": w for p, w in producers.items()} | {f"{p}.bias": b for p, b in biases.items()}
