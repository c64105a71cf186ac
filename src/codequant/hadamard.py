"""The orthogonal transform of any width, fixed by the width alone, that spreads an outlier over all channels.

    H_n = S_{2^j} (x) B_1 (x) ... (x) B_r  / sqrt(n),    n = 2^j * |B_1| * ... * |B_r|

(x) is the Kronecker product, S Sylvester's matrix, each B a Hadamard matrix of order 4g for an odd g, by Paley's
constructions: order q + 1 for a prime q = 3 mod 4, order 2(q + 1) for a prime q = 1 mod 4. So 12, 20, 28, 36, 44, 60
and many more exist, and 576 = 4 * 12 * 12 is a true Hadamard matrix: every entry +-1/sqrt(n). An odd factor for which n
has too few twos, or no construction here, becomes the orthonormal DCT-II of that order instead.

Weights are stored rotated by H_n: the choice of factors is part of the format and may never change for a width.
"""

from functools import cache, reduce
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

RADIX = 64  # of the butterflies: dense products of 64 channels are several times faster here than six passes of two


def hadamard_matrix(n: int) -> Tensor:
    """H_n, float64 [n, n]; orthogonal, in general not symmetric."""
    blocks, scale = _blocks(n, torch.float64, torch.device("cpu"))
    return reduce(torch.kron, blocks, torch.ones(1, 1, dtype=torch.float64)) * scale


def hadamard_transform(x: Tensor) -> Tensor:
    """x [..., n] @ H_n in float32 (float64 for float64 x), one small product per factor: O(n log n)."""
    y = x if x.dtype == torch.float64 else x.float()
    inner = n = x.shape[-1]
    blocks, scale = _blocks(n, y.dtype, y.device)
    for block in blocks:
        order = len(block)
        inner //= order
        y = block.mT @ y.reshape(-1, order, inner) if inner > 1 else y.reshape(-1, order) @ block
    return y.reshape(x.shape) * scale


def hadamard_factors(n: int) -> tuple[list[tuple[int, Tensor | None]], float]:
    """H_n for kernels: the orders and matrices (float32) of its Kronecker factors, and what to multiply their product
    by. None stands for Sylvester's matrix, whose butterflies run over what the later factors leave: at least 16 wide
    where there is any choice."""
    power, dense, scale = _parts(n)
    dense = dense or [_sylvester(min(power, 16))]
    sylvester = n // prod(map(len, dense))
    factors: list[tuple[int, Tensor | None]] = [(sylvester, None), *((len(block), block.float()) for block in dense)]
    return factors, scale


@cache
def _blocks(n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], float]:
    """Factors of H_n in order, and the number to multiply their Kronecker product by."""
    power, dense, scale = _parts(n)
    blocks = [_sylvester(RADIX)] * ((power.bit_length() - 1) // (RADIX.bit_length() - 1))
    blocks += [_sylvester(power // RADIX ** len(blocks)), *dense]
    return [block.to(device, dtype) for block in blocks if len(block) > 1], scale


def _parts(n: int) -> tuple[int, list[Tensor], float]:
    """H_n as (order of its Sylvester factor, its other factors, and the number to multiply their product by)."""
    power, hadamards, cosines = _factors(n)
    return power, [*map(_paley, hadamards), *map(_cosines, cosines)], (power * prod(hadamards)) ** -0.5


@cache
def _factors(n: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """n as (power of two, orders of Hadamard blocks, orders of cosine blocks); raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"width: {n}, expected a positive number")
    twos = (n & -n).bit_length() - 1
    _, hadamards, cosines = _split(n >> twos, twos)
    return n // prod(hadamards) // prod(cosines), hadamards, cosines


@cache
def _split(odd: int, twos: int) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]:
    """Best blocks for an odd number: first the fewest channels in cosine blocks, then the fewest multiplications."""
    if odd == 1:
        return (1, 0), (), ()
    choices = []
    for g in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        if twos >= 2 and _has_paley(4 * g):
            (dense, work), hadamards, cosines = _split(odd // g, twos - 2)
            choices.append(((dense, work + 4 * g), tuple(sorted((4 * g, *hadamards))), cosines))
        (dense, work), hadamards, cosines = _split(odd // g, twos)
        choices.append(((dense * g, work + g), hadamards, tuple(sorted((g, *cosines)))))
    return min(choices)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def _has_paley(order: int) -> bool:
    """Whether there is a construction for this order, 4 times an odd number: then q has the right remainder mod 4."""
    return _is_prime(order - 1) or _is_prime(order // 2 - 1)


def _sylvester(order: int) -> Tensor:
    """Sylvester's matrix of a power of two, entries +-1, float64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < order:
        H = torch.cat((torch.cat((H, H), dim=1), torch.cat((H, -H), dim=1)))
    return H


def _paley(order: int) -> Tensor:
    """A Hadamard matrix of this order (4 times an odd number), entries +-1, float64."""
    first = _is_prime(order - 1)
    q = order - 1 if first else order // 2 - 1
    residues = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)  # conference matrix: zero diagonal, C C^T = q I
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1  # skew for q = 3 mod 4, symmetric for q = 1 mod 4
    core[1:, 1:] = chi[(i[:, None] - i) % q]
    eye = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return eye + core
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, diagonal)


def _cosines(order: int) -> Tensor:
    """The orthonormal DCT-II, float64; its first column is constant."""
    i = torch.arange(order, dtype=torch.float64)
    C = torch.cos(torch.pi / order * (i[:, None] + 0.5) * i) * sqrt(2 / order)
    C[:, 0] /= sqrt(2)
    return C
