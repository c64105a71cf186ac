"""One rank's piece of a quantized matrix under tensor parallelism, cut from the tensors of the format."""

from dataclasses import dataclass

import torch
from torch import Tensor

from codequant.packing import pack_indices, unpack_indices
from codequant.quantization_config import Scheme


@dataclass(frozen=True)
class Piece:
    """One of `count` equal pieces of a dimension."""

    index: int = 0
    count: int = 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        size = tensor.shape[dim] // self.count
        return tensor.narrow(dim, self.index * size, size)


WHOLE = Piece()


def cut(
    suffix: str,
    tensor: Tensor,
    scheme: Scheme,
    in_features: int,
    bits: int,
    rows: Piece = WHOLE,
    columns: Piece = WHOLE,
) -> Tensor:
    """A piece of `X.weight_<suffix>` (see `packing`), for a module that stores `bits` >= scheme.bits per index.

    Pieces of columns must hold whole groups; a codebook of whole rows serves every piece. Wider indices leave the added
    codebook entries unused.
    """
    tensor = rows.of(tensor, 0)
    if suffix == "packed":
        if columns.count == 1 and bits == scheme.bits:
            return tensor
        # Unpacked, because a piece need not start on a byte.
        return pack_indices(columns.of(unpack_indices(tensor, scheme.bits, in_features), 1), bits)
    if scheme.group_size != -1:
        tensor = columns.of(tensor, 1)
    if suffix == "codebook" and bits > scheme.bits:
        last = tensor[..., -1:].expand(*tensor.shape[:-1], 2**bits - tensor.shape[-1])
        tensor = torch.cat((tensor, last), dim=-1)
    return tensor
