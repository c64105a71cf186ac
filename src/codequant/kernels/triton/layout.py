"""The weight layout of the Triton kernels, and the way there and back.

Every width (2, 3 or 4 bits) is stored as 4-bit indices into a 16-entry table: one layout and one set of kernels, at the
price of 2-bit weights being read as 4-bit ones.

A row's columns are split at its codebook groups; a group of S columns is padded to P = a multiple of 64 and becomes P/8
little-endian 32-bit words. Bits 4j..4j+3 of word i hold the index of column 4i + j of the group's *first half*, bits
16+4j.. that of column P/2 + 4i + j. So each 16-bit half of a word is, once its high bits are split off, the selector of
a byte permutation (`prmt`) that looks up four int8 entries, the four bytes it yields meet four *consecutive*
activations, and viewed as bytes a row is one contiguous operand per half for the tensor cores.

A lookup that feeds a dot product need not choose between the two halves of a table. Bit 3 of a selector's nibble, set
if the index is 8 or more, asks for the sign of a byte, 0 or -1, instead of the byte: entry l, looked up with the index,
and entry l + 8, looked up with that bit flipped, add up to the right one of them, less 1 if the other is negative.
`paired_entries` puts that right in advance, if there is room within int8. To this end the neighbours of an ascending
codebook are stored as l and l + 8: room lacks only where 127 is the one entry that is not negative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codequant.packing import ENTRY_MAX, PackedWeight, pack_indices, unpack_indices

ENTRIES = 16
COLUMN_MULTIPLE = 64  # 32 columns per half: the shortest int8 tensor-core product


@dataclass(frozen=True)
class TritonWeight:
    """E matrices [O, I] with G codebook groups of S = I / G columns, padded to P columns."""

    words: Tensor  # int32 [E, O, G * P / 8]
    table: Tensor  # int32 [E, O, G, 4]: sixteen int8 entries
    paired: Tensor  # int32 [E, O, 1, 4]: the same as `paired_entries`; empty where G > 1 or there are none
    step: Tensor  # float32 [E, O, G]
    row_sum: Tensor  # float32 [E, O]: sum over groups of step * sum of the row's entries
    norm: Tensor  # float32 [E]: the largest Euclidean norm of a row
    in_features: int
    bits: int
    stacked: bool  # False: a single matrix, and E = 1

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def groups(self) -> int:
        return self.table.shape[2]

    def dot_table(self, planes: int) -> tuple[Tensor, bool]:
        """(the table for dot products with so many int8 planes, int64 [E, O, G, 2]; whether it is the paired one, which
        is for a single plane: several share their lookups, and would each add up two halves)."""
        paired = planes == 1 and self.paired.numel() > 0
        return (self.paired if paired else self.table).view(torch.int64), paired

    @property
    def tensors(self) -> list[Tensor]:
        """In the order in which the custom operators take them."""
        return [self.words, self.table, self.paired, self.step, self.row_sum, self.norm]


def padded_group(group_size: int) -> int:
    """P of a group of S columns."""
    return -(-group_size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _order(entries: int, device: torch.device) -> Tensor:
    """int64 [entries]: which entry of an ascending codebook is stored at each place."""
    order = torch.arange(entries, device=device)
    # Of fewer than sixteen each is beside a place that holds zero.
    return order if entries < ENTRIES else order.view(-1, 2).T.flatten()


def paired_entries(table: Tensor) -> Tensor | None:
    """int8 [..., 16] -> int8 [..., 16] whose entries l and l + 8 are more by 1 if the other of the two, in the result,
    is negative; None if one would be 128."""
    low, high = table.int().unflatten(-1, (2, -1)).unbind(-2)
    # Two negative ones grow both, but for -1: it becomes 0, and the other stays.
    stays = (high >= 0) | ((high == -1) & (low < -1))
    low = torch.where(stays, low, low + 1)
    high = high + (low < 0)
    paired = torch.cat((low, high), -1)
    return None if (paired > ENTRY_MAX).any() else paired.to(torch.int8)


def words_from_indices(indices: Tensor, groups: int) -> Tensor:
    """uint8 indices [..., I] -> int32 words [..., G * P / 8]."""
    *lead, I = indices.shape
    S = I // groups
    P = padded_group(S)
    padded = torch.nn.functional.pad(indices.view(*lead, groups, S), (0, P - S))
    nibbles = padded.view(*lead, groups, 2, P // 8, 2, 2)  # half, word, byte of the half, nibble
    halves = nibbles[..., 0] | (nibbles[..., 1] << 4)  # [..., G, 2, P/8, 2]
    return halves.transpose(-3, -2).contiguous().view(*lead, groups * P // 8, 4).view(torch.int32).squeeze(-1)


def indices_from_words(words: Tensor, groups: int, in_features: int) -> Tensor:
    """Inverse of `words_from_indices`."""
    *lead, _ = words.shape
    S = in_features // groups
    P = padded_group(S)
    halves = words.unsqueeze(-1).view(torch.uint8).view(*lead, groups, P // 8, 2, 2).transpose(-3, -2)
    padded = torch.stack((halves & 0xF, halves >> 4), dim=-1).reshape(*lead, groups, P)
    return padded[..., :S].reshape(*lead, in_features)


def _repack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One matrix: (words, table, step, row_sum, norm), without the leading E; the table int8 [O, G, 16]."""
    O, G, K = weight.codebook.shape
    order = _order(K, weight.codebook.device)
    indices = unpack_indices(weight.packed, weight.bits, weight.in_features)
    words = words_from_indices(order.argsort().to(torch.uint8)[indices.int()], G)
    table = torch.nn.functional.pad(weight.codebook[..., order], (0, ENTRIES - K))
    step = weight.step.float()
    counts = torch.stack([(indices.view(O, G, -1) == k).sum(-1) for k in range(K)], dim=-1)  # [O, G, K]
    entry_sum = (counts * weight.codebook).sum(-1)  # [O, G]
    squares = (counts * weight.codebook.int() ** 2).sum(-1)  # [O, G]
    norm = (step.double() ** 2 * squares).sum(-1).max().sqrt()
    return words, table, step, (step.double() * entry_sum).sum(-1).float(), norm.float()


def to_triton(weight: PackedWeight) -> TritonWeight:
    """Repack a matrix or a stack of them, one matrix at a time so that peak memory stays near the result's size."""
    stacked = weight.packed.dim() == 3
    if not stacked:
        parts = [_repack(weight)]
    else:
        each = zip(weight.packed, weight.codebook, weight.step, strict=True)
        parts = [_repack(PackedWeight(p, c, s, weight.in_features)) for p, c, s in each]
    words, table, step, row_sum, norm = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    paired = paired_entries(table) if table.shape[2] == 1 else None
    if paired is None:
        paired = table[:0]
    tables = (table.view(torch.int32), paired.view(torch.int32))
    return TritonWeight(words, *tables, step, row_sum, norm, weight.in_features, weight.bits, stacked)


def from_triton(weight: TritonWeight) -> PackedWeight:
    """Inverse of `to_triton`, bit for bit."""
    G, order = weight.groups, _order(2**weight.bits, weight.words.device)
    packed = torch.stack(
        [
            pack_indices(order.to(torch.uint8)[indices_from_words(words, G, weight.in_features).int()], weight.bits)
            for words in weight.words
        ]
    )
    codebook = weight.table.view(torch.int8)[..., order.argsort()].contiguous()
    step = weight.step.to(torch.float16)
    if not weight.stacked:
        packed, codebook, step = packed[0], codebook[0], step[0]
    return PackedWeight(packed, codebook, step, weight.in_features)
