# Triton takes tuples that grow by addition alone, and no annotations on variables.
# mypy: disable-error-code="assignment"
"""The weighted results of each token's experts, summed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from codequant.kernels.triton.launch import Launch, follow


@triton.jit
def _combine(y, expert, out, N, E, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = ()
    for slot in tl.static_range(TOP_K):  # older than the kernel before this one, which waited for them
        experts += (tl.load(expert + token * TOP_K + slot),)
    follow(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        routed = (experts[slot] >= 0) & (experts[slot] < E)  # the rows of other pairs hold nothing
        source = y + (token * TOP_K + slot) * N + n
        total += tl.load(source, mask=(n < N) & routed, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


def combine(y: Tensor, expert: Tensor, experts: int, top_k: int, out_dtype: torch.dtype, pdl: Launch) -> Tensor:
    """y [pairs, N], already weighted, and expert [pairs] -> [tokens, N]; sums in float32, in the order of the pairs."""
    tokens, N = len(y) // top_k, y.shape[1]
    out = torch.empty(tokens, N, dtype=out_dtype, device=y.device)
    BLOCK = min(1024, triton.next_power_of_2(N))
    _combine[(triton.cdiv(N, BLOCK), tokens)](y, expert, out, N, experts, top_k, BLOCK, num_warps=4, **pdl.options)
    return out
