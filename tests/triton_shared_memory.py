"""Compiles the tensor-core kernels for a GPU generation, without a GPU, with every tile of its dispatch table.

    python tests/triton_shared_memory.py 89

prints a line "bytes of shared memory, row length, tile" for each. Overlapped products are compiled for short rows too,
because the compiler fails on loops of one turn. (Not in Triton's interpreter, which compiles nothing.)
"""

import sys
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from codequant.kernels.triton import dispatch, grouped, overlapped
from codequant.kernels.triton.activation import Form
from codequant.kernels.triton.dispatch import Generation, Tile

POINTERS = {
    "x": "i8", "x_scale": "fp32", "x_zero": "fp32", "pair_weight": "fp32", "packed": "u8", "table": "i32",
    "step": "fp32", "row_sum": "fp32", "bias": "fp32", "out": "bf16", "pair": "i32", "block_expert": "i32",
    "block_start": "i32", "block_end": "i32",
}  # fmt: skip
BOUNDED = {"norm": "fp32", "out_scale": "fp32"}  # further ones of overlapped products
NUMBERS = ("tokens", "plane", "N", "E")
COLUMNS = 4096
SHORT = (256, 384, 512, 640)  # two to five steps of 64 bytes


def tiles(chip: Generation) -> Iterator[tuple[Form, int, bool, Tile]]:
    """(activations, tokens of a block, gate and up together, tile)."""
    for form in chip.grouped:
        for config in chip.grouped[form]:
            for up, down in (config.up, config.down), (config.wide_up, config.wide_down):
                yield form, config.tokens, True, up
                yield form, config.tokens, False, down
        for linear in chip.linear[form]:
            yield form, linear.tokens, False, linear.tile


def shared_memory(capability: int, columns: int, form: Form, tokens: int, gated: bool, tile: Tile) -> int:
    item = 2 if form is Form.FLOAT16 else 1
    step = overlapped.step_bytes(columns // 2, tile.bytes) if tile.overlap else tile.bytes
    constants = dict(
        TOP_K=8, P=columns, ROUTED=True, GATHER=gated, SCATTER=not gated, GATED=gated,
        ACTIVATION="silu" if gated else "none", HAS_BIAS=False, PLANES=form.planes, FLOAT=item == 2, BM=tokens,
        BN=tile.rows, BK=step // item, STAGES=tile.stages, PDL=False,
    )  # fmt: skip
    half = tile.overlap and item == 2 and gated  # what `down` multiplies next
    constants |= dict(SPAN=tile.span, SPECIALIZED=tile.specialized, HALF=half) if tile.overlap else dict(G=1)
    types = POINTERS | (BOUNDED if tile.overlap else {}) | (dict(x="fp16", packed="u16") if item == 2 else {})
    types |= dict(out="fp16") if half else {}
    signature = {name: f"*{dtype}" for name, dtype in types.items()} | dict.fromkeys(NUMBERS, "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    make, kernel = (GluonASTSource, overlapped.kernel) if tile.overlap else (ASTSource, grouped._grouped)
    source = make(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": tile.warps, "maxnreg": tile.registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


if __name__ == "__main__":
    capability = int(sys.argv[1])
    cases = [(COLUMNS, *case) for case in tiles(dispatch.HOPPER if capability == 90 else dispatch.AMPERE)]
    by_form = {form: case for _, form, *case in reversed(cases) if case[-1].overlap}
    cases += [(columns, form, *case) for form, case in by_form.items() for columns in SHORT]
    for case in dict.fromkeys(cases):
        print(shared_memory(capability, *case), *case)
