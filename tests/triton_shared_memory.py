"""Compiles the tensor-core kernel for a GPU generation, without a GPU, with every tile of the dispatch table.

    python tests/triton_shared_memory.py 89

prints a line "bytes of shared memory, tile" for each. (Not in Triton's interpreter, which compiles nothing.)
"""

import sys
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from codequant.kernels.triton import dispatch, grouped
from codequant.kernels.triton.dispatch import Tile

POINTERS = {
    "x_high": "i8", "x_low": "i8", "x_scale": "fp32", "x_zero": "fp32", "pair_weight": "fp32", "packed": "u8",
    "table": "i32", "step": "fp32", "row_sum": "fp32", "bias": "fp32", "out": "bf16", "pair": "i32",
    "block_expert": "i32", "block_start": "i32", "block_end": "i32",
}  # fmt: skip
NUMBERS = ("tokens", "N", "E")


def tiles() -> Iterator[tuple[int, int, bool, Tile]]:
    """(planes, tokens of a block, gate and up together, tile)."""
    chip = dispatch.AMPERE
    for planes in (1, 2):
        for config in chip.grouped[planes]:
            yield planes, config.tokens, True, config.up
            yield planes, config.tokens, False, config.down
            yield planes, config.tokens, False, config.wide_down
        for linear in chip.linear[planes]:
            yield planes, linear.tokens, False, linear.tile


def shared_memory(capability: int, planes: int, tokens: int, gated: bool, tile: Tile) -> int:
    constants = dict(
        TOP_K=8, G=1, P=4096, ROUTED=True, GATHER=gated, SCATTER=not gated, GATED=gated,
        ACTIVATION="silu" if gated else "none", HAS_BIAS=False, PLANES=planes, BM=tokens, BN=tile.rows, BK=tile.bytes,
        STAGES=tile.stages, PDL=False,
    )  # fmt: skip
    signature = {name: f"*{dtype}" for name, dtype in POINTERS.items()} | dict.fromkeys(NUMBERS, "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    source = ASTSource(grouped._grouped, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": tile.warps, "maxnreg": tile.registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


if __name__ == "__main__":
    for case in dict.fromkeys(tiles()):
        print(shared_memory(int(sys.argv[1]), *case), *case)
