"""The format: a weight matrix as packed indices into int8 codebooks. This file is its only definition.

A matrix W [O, I] becomes three tensors, stored under the checkpoint's own name `X.weight` as

    X.weight_packed    uint8   [O, ceil(I * bits / 8)]   indices, a little-endian bit stream per row
    X.weight_codebook  int8    [O, G, K]                 K = 2**bits entries, ascending; G = I / group_size
    X.weight_step      float16 [O, G]                    W[o, i] = codebook[o, g, index] * step[o, g]

with g = i // group_size, and group_size = -1 meaning the whole row (G = 1).

Bit order: index i of a row occupies bits [i * bits, (i + 1) * bits) of the row, bit b being bit b % 8 (from the least
significant) of byte b // 8. So 4-bit indices sit low nibble first, 2-bit ones four to a byte from the low end, and
eight 3-bit ones fill three bytes. Rows start on a byte; the unused high bits of a row's last byte are zero.

Why int8 entries with one float16 step: they cost 0.02% in weight error against free float16 centroids, feed int8 dot
products on CPU and GPU unchanged, and int8 * float16 is exact in float32, so a GGUF Q8_0 export is exact too. The
step is fixed in float16 *before* the entries are rounded. It may be subnormal; an all-zero group has step 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4)
SUFFIXES = ("packed", "codebook", "step")
ENTRY_MAX = 127  # entries are symmetric, -127..127, so that a kernel may negate them


@dataclass(frozen=True)
class PackedWeight:
    """One matrix in the format above, or a stack: every tensor may carry the same leading dimensions [..., ]."""

    packed: Tensor  # uint8 [..., O, ceil(I * bits / 8)]
    codebook: Tensor  # int8 [..., O, G, K]
    step: Tensor  # float16 [..., O, G]
    in_features: int

    @property
    def bits(self) -> int:
        return self.codebook.shape[-1].bit_length() - 1

    @property
    def out_features(self) -> int:
        return self.packed.shape[-2]

    @property
    def group_size(self) -> int:
        """Columns that share a codebook; the whole row is in_features, never -1."""
        return self.in_features // self.codebook.shape[-2]

    def matrix(self, index: int) -> "PackedWeight":
        """One of a stack."""
        return PackedWeight(self.packed[index], self.codebook[index], self.step[index], self.in_features)


@dataclass(frozen=True)
class PackedParts:
    """A stack of E matrices [E, O, I] whose rows lie in several tensors, in order and equally many in each: gate and up
    of every expert, as most checkpoints have them. To join them is a copy that a backend may avoid."""

    parts: list[PackedWeight]  # E * P of [O / P, I], with the same bits and groups
    matrices: int  # E

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def bits(self) -> int:
        return self.parts[0].bits

    @property
    def group_size(self) -> int:
        return self.parts[0].group_size

    def tensors(self, suffix: str) -> list[Tensor]:
        return [getattr(part, suffix) for part in self.parts]

    def joined(self, suffix: str) -> Tensor:
        """[E, O, ...]."""
        return torch.cat(self.tensors(suffix)).unflatten(0, (self.matrices, -1))

    def join(self) -> PackedWeight:
        packed, codebook, step = map(self.joined, SUFFIXES)
        return PackedWeight(packed, codebook, step, self.in_features)


def packed_columns(in_features: int, bits: int) -> int:
    """Bytes in one row of packed indices."""
    return -(-in_features * bits // 8)


def groups_per_row(in_features: int, group_size: int) -> int:
    """G for a row of in_features columns. Raises ValueError where group_size does not divide the row."""
    if group_size == -1:
        return 1
    if group_size <= 0 or in_features % group_size:
        raise ValueError(f"group_size: {group_size}, expected -1 or a positive divisor of {in_features} input channels")
    return in_features // group_size


def shapes(out_features: int, in_features: int, bits: int, group_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the three tensors of an [out_features, in_features] matrix, by suffix."""
    groups = groups_per_row(in_features, group_size)
    return {
        "packed": (out_features, packed_columns(in_features, bits)),
        "codebook": (out_features, groups, 2**bits),
        "step": (out_features, groups),
    }


DTYPES = {"packed": torch.uint8, "codebook": torch.int8, "step": torch.float16}


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """uint8 [..., I] with values < 2**bits -> uint8 [..., ceil(I * bits / 8)] in the bit order of this format."""
    if bits not in BITS:
        raise ValueError(f"bits: {bits}, expected one of {BITS}")
    *lead, I = indices.shape
    if bits == 4:
        padded = torch.nn.functional.pad(indices, (0, I % 2))
        return padded[..., 0::2] | (padded[..., 1::2] << 4)
    # Eight indices always fill `bits` whole bytes: work in such octets, whatever the width.
    octets = -(-I // 8)
    padded = torch.nn.functional.pad(indices, (0, octets * 8 - I)).view(*lead, octets, 8).to(torch.int32)
    word = (padded << (torch.arange(8, device=indices.device) * bits)).sum(-1, dtype=torch.int32)  # [..., octets]
    octet_bytes = (word.unsqueeze(-1) >> (torch.arange(bits, device=indices.device) * 8)) & 0xFF
    return octet_bytes.to(torch.uint8).flatten(-2)[..., : packed_columns(I, bits)].contiguous()


def unpack_indices(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of `pack_indices`: uint8 [..., ceil(I * bits / 8)] -> uint8 [..., I]."""
    if bits not in BITS:
        raise ValueError(f"bits: {bits}, expected one of {BITS}")
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :in_features]
    *lead, columns = packed.shape
    octets = -(-columns // bits)
    padded = torch.nn.functional.pad(packed, (0, octets * bits - columns)).view(*lead, octets, bits).to(torch.int32)
    word = (padded << (torch.arange(bits, device=packed.device) * 8)).sum(-1, dtype=torch.int32)
    indices = (word.unsqueeze(-1) >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    return indices.to(torch.uint8).flatten(-2)[..., :in_features].contiguous()


def round_codebook(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Round float centroids [..., G, K] to the format: (int8 entries [..., G, K], float16 step [..., G]).

    The order of the centroids is kept; rounding is monotone, so ascending centroids give ascending entries.
    Raises ValueError for centroids that are not finite or too large for a float16 step.
    """
    peak = centroids.float().abs().amax(-1)  # [..., G]
    step = (peak / ENTRY_MAX).to(torch.float16)
    if not bool(torch.isfinite(step).all()):
        raise ValueError(f"centroids: largest magnitude {float(peak.max()):g}, expected finite values below 8.3e6")
    # Rounding the step down may push the largest entry past 127 by one part in 2048 (far more for subnormal steps).
    step = torch.where(
        peak > step.float() * (ENTRY_MAX + 0.5), torch.nextafter(step, step.new_full((), torch.inf)), step
    )
    divisor = torch.where(step == 0, 1.0, step.float()).unsqueeze(-1)
    entries = torch.where(step.unsqueeze(-1) == 0, 0.0, (centroids.float() / divisor).round())
    return entries.clamp(-ENTRY_MAX, ENTRY_MAX).to(torch.int8), step


def pack(indices: Tensor, codebook: Tensor, step: Tensor) -> PackedWeight:
    """uint8 indices [..., O, I], int8 codebook [..., O, G, K], float16 step [..., O, G] -> PackedWeight.

    Codebooks are put into ascending order here and the indices renumbered, so callers need not keep them sorted.
    """
    *_, O, I = indices.shape
    G, K = codebook.shape[-2:]
    codebook, order = codebook.sort(dim=-1, stable=True)
    rank = order.argsort(-1).to(torch.uint8)  # [..., O, G, K]: old index -> new index
    grouped = indices.view(*indices.shape[:-1], G, I // G).long()
    indices = rank.gather(-1, grouped).view(indices.shape)
    return PackedWeight(pack_indices(indices, K.bit_length() - 1), codebook, step, I)


def unpack(weight: PackedWeight) -> Tensor:
    """The float32 matrix [..., O, I] that a PackedWeight stands for; exact (int8 times float16 fits in float32)."""
    indices = unpack_indices(weight.packed, weight.bits, weight.in_features)
    G = weight.codebook.shape[-2]
    grouped = indices.view(*indices.shape[:-1], G, -1).long()  # [..., O, G, S]
    table = weight.codebook.float() * weight.step.float().unsqueeze(-1)  # [..., O, G, K]
    return table.gather(-1, grouped).flatten(-2)
