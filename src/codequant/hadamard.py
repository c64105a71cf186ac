"""The orthogonal transform of any width, fixed by the width alone, that spreads an outlier over all channels.

    H_n = S_{2^j} (x) B_1 (x) ... (x) B_r  / sqrt(n),    n = 2^j * |B_1| * ... * |B_r|

(x) is the Kronecker product, S Sylvester's matrix, each B a Hadamard matrix of order 4g for an odd g, by Paley's
constructions: order q + 1 for a prime q = 3 mod 4, order 2(q + 1) for a prime q = 1 mod 4. So 12, 20, 28, 36, 44, 60
and many more exist, and 576 = 4 * 12 * 12 is a true Hadamard matrix: every entry +-1/sqrt(n). An odd factor for which n
has too few twos, or no construction here, becomes the orthonormal DCT-II of that order instead.

Weights are stored rotated by H_n: the choice of factors is part of the format and may never change for a width.
"""

from functools import cache
from math import isqrt, prod, sqrt

import torch
from torch import Tensor


def hadamard_matrix(n: int) -> Tensor:
    """H_n, float64 [n, n]; orthogonal, in general not symmetric."""
    power, hadamards, cosines = _factors(n)
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    for block in (*map(_paley, hadamards), *map(_cosines, cosines)):
        H = torch.kron(H, block)
    return H / sqrt(power * prod(hadamards))


def hadamard_transform(x: Tensor) -> Tensor:
    """x [..., n] @ H_n in float32 (float64 for float64 x): butterflies for the power of two, one small product for
    each other factor."""
    n = x.shape[-1]
    power, hadamards, cosines = _factors(n)
    y = x.double() if x.dtype == torch.float64 else x.float()
    inner = n // power
    stride = inner
    while stride < n:
        a, b = y.view(-1, n // (2 * stride), 2, stride).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2)
        stride *= 2
    for kind, orders in (("hadamard", hadamards), ("cosine", cosines)):
        for order in orders:
            inner //= order
            block = _block(kind, order, y.dtype, y.device)
            y = (y.reshape(-1, order, inner).transpose(-1, -2) @ block).transpose(-1, -2)
    return y.reshape(x.shape) * (power * prod(hadamards)) ** -0.5


@cache
def _block(kind: str, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (_paley(order) if kind == "hadamard" else _cosines(order)).to(device, dtype)


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


@cache
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


@cache
def _cosines(order: int) -> Tensor:
    """The orthonormal DCT-II, float64; its first column is constant."""
    i = torch.arange(order, dtype=torch.float64)
    C = torch.cos(torch.pi / order * (i[:, None] + 0.5) * i) * sqrt(2 / order)
    C[:, 0] /= sqrt(2)
    return C
