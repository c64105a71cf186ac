"""The pieces of a matrix that tensor parallelism gives to its ranks."""

import pytest
import torch
from helpers import round_to_nearest

from codequant.packing import SUFFIXES, PackedWeight, unpack
from codequant.quantization_config import Scheme
from codequant.serving.shards import Piece, cut


@pytest.mark.parametrize("stored_bits", [0, 4])
@pytest.mark.parametrize("group_size", [-1, 7])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pieces_are_the_pieces_of_the_matrix(bits: int, group_size: int, stored_bits: int) -> None:
    """Row and column pieces of every rank, on widths where a piece does not start on a byte."""
    O, I = 6, 42
    W = round_to_nearest(torch.randn(O, I, generator=torch.Generator().manual_seed(bits)), bits, group_size)
    whole, scheme = unpack(W), Scheme(bits=bits, group_size=group_size)
    width = max(bits, stored_bits)
    for rows, columns in [(Piece(i, 3), Piece(j, 2)) for i in range(3) for j in range(2)] + [(Piece(), Piece(2, 3))]:
        tensors = {s: cut(s, getattr(W, s), scheme, I, width, rows, columns) for s in SUFFIXES}
        piece = PackedWeight(**tensors, in_features=I // columns.count)
        assert piece.bits == width
        expected = whole.chunk(rows.count, 0)[rows.index].chunk(columns.count, 1)[columns.index]
        assert torch.equal(unpack(piece), expected)


def test_an_uncut_matrix_is_not_copied() -> None:
    W = round_to_nearest(torch.randn(4, 8), 4, -1)
    for suffix in SUFFIXES:
        tensor = getattr(W, suffix)
        assert cut(suffix, tensor, Scheme(), 8, 4).data_ptr() == tensor.data_ptr()
