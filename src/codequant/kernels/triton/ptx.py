"""The few PTX instructions that Triton does not expose, as functions of blocks.

A table of 16 int8 entries is four registers. `prmt.b32 d, a, b, s` picks four of the eight bytes of (a, b) by the four
nibbles of s, of which bits 0..2 count: two of them look up entries 0..7 and 8..15 for the low three bits of four
indices, and a third one, whose selector is built from the indices' top bits, takes each byte from the right result.
Eight weights cost six `prmt` and five other instructions. Permutations, shifts and logic share one pipe, which limits
the kernels of small batches; so the two shifts by 16 are dot products with (0, 0, 0, 1), the top bits are what a
subtraction of the others leaves, both on another pipe (2 to 10% and 1 to 4% faster on an H200), and their shift and the
addition that makes them a selector become one instruction.

Where a dot product follows, on that other pipe, both halves of a table may be summed up instead of chosen from: bit 3
of a nibble asks for the sign of its byte, which `layout.paired_entries` has allowed for. Then four `prmt` and one `xor`
are all that the limiting pipe gets.
"""

import triton
import triton.language as tl

_ENTRIES = """prmt.b32 a, $t0, $t1, low;
prmt.b32 b, $t2, $t3, low;
prmt.b32 {}, a, b, top;
"""
# As float16: byte b beside 0x64 is 1024 + b, and b is 128 more than the entry.
_OFFSET = """.reg .b32 offset;
mov.b32 offset, 0x64806480;
"""
_FLOAT_ENTRIES = f"""{_ENTRIES.format("a")}prmt.b32 b, a, 0x64646464, 0x4140;
sub.f16x2 {{}}, b, offset;
prmt.b32 b, a, 0x64646464, 0x4342;
sub.f16x2 {{}}, b, offset;
"""


def _lookup(half: str, first: list[str], second: list[str], constants: str = "") -> str:
    """`half` for the four indices in the low 16 bits of $word, with results `first`, and for those in the high ones."""
    return f"""{{
.reg .b32 low, top, a, b;
{constants}and.b32 low, $word, 0x77777777;
sub.u32 top, $word, low;
shr.u32 top, top, 1;
add.u32 top, top, 0x32103210;
{half.format(*first)}dp2a.hi.u32.u32 low, low, 0x01000000, 0;
dp2a.hi.u32.u32 top, top, 0x01000000, 0;
{half.format(*second)}}}"""


def _operands(asm: str, **registers: int) -> str:
    for name, register in registers.items():
        asm = asm.replace("$" + name, f"${register}")
    return asm


_LOOKUP = _lookup(_ENTRIES, ["$0"], ["$1"])
_FLOAT_LOOKUP = _lookup(_FLOAT_ENTRIES, ["$0", "$1"], ["$2", "$3"], _OFFSET)

_DOT = """{
.reg .b32 word, flipped, a, b, sum;
mov.b32 word, $word;
xor.b32 flipped, word, 0x88888888;
prmt.b32 a, $t0, $t1, word;
prmt.b32 b, $t2, $t3, flipped;
dp4a.s32.s32 sum, a, $first, $acc;
dp4a.s32.s32 sum, b, $first, sum;
dp2a.hi.u32.u32 word, word, 0x01000000, 0;
dp2a.hi.u32.u32 flipped, flipped, 0x01000000, 0;
prmt.b32 a, $t0, $t1, word;
prmt.b32 b, $t2, $t3, flipped;
dp4a.s32.s32 sum, a, $second, sum;
dp4a.s32.s32 $0, b, $second, sum;
}"""

_WORD_DOT = tl.constexpr(_operands(_DOT, word=1, t0=2, t1=3, t2=4, t3=5, first=6, second=7, acc=8))
_WORD_LOOKUP = tl.constexpr(_operands(_LOOKUP, word=2, t0=3, t1=4, t2=5, t3=6))
_WORD_CONSTRAINTS = tl.constexpr("=&r,=&r,r,r,r,r,r")
# With pack=4 a register holds four bytes of `packed`, and each table operand arrives four times, in equal registers.
_BYTE_LOOKUP = tl.constexpr(_operands(_LOOKUP, word=2, t0=3, t1=7, t2=11, t3=15))
_BYTE_CONSTRAINTS = tl.constexpr("=&r,=&r," + ",".join("r" * 17))
_PAIR_LOOKUP = tl.constexpr(_operands(_FLOAT_LOOKUP, word=4, t0=5, t1=7, t2=9, t3=11))
_PAIR_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r," + ",".join("r" * 9))


@triton.jit
def lookup_words(words, t0, t1, t2, t3):
    """int32 words -> (first, second): four int8 entries in each int32, for the low and the high half of the word."""
    return tl.inline_asm_elementwise(
        _WORD_LOOKUP, _WORD_CONSTRAINTS, [words, t0, t1, t2, t3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def lookup_dot(words, t0, t1, t2, t3, first, second, acc):
    """acc + the dot product of the eight entries of each word, from tables of `paired_entries`, with eight bytes."""
    return tl.inline_asm_elementwise(
        _WORD_DOT, "=r,r,r,r,r,r,r,r,r", [words, t0, t1, t2, t3, first, second, acc],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def lookup_bytes(packed, t0, t1, t2, t3):
    """uint8 [N, B], the bytes of B/4 words -> (first, second), int8 [N, B] each: the columns of the two halves."""
    return tl.inline_asm_elementwise(
        _BYTE_LOOKUP, _BYTE_CONSTRAINTS, [packed, t0, t1, t2, t3], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def biased_entries(table):
    """Four int8 entries of a register -> as bytes, 128 more each."""
    return table ^ -0x7F7F7F80


@triton.jit
def lookup_pairs(packed, t0, t1, t2, t3):
    """uint16 [N, B], the halves of B/2 words, and tables of `biased_entries` -> four times float16 [N, B]: elements 2i
    and 2i + 1 of the j-th are the entries of indices 2j and 2j + 1 of word i."""
    return tl.inline_asm_elementwise(
        _PAIR_LOOKUP,
        _PAIR_CONSTRAINTS,
        [packed, t0, t1, t2, t3],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def dp4a(a, b, c):
    """c + the dot product of the four signed bytes of a and of b."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x):
    """1 / x of float32 to 1 ulp, in one instruction; infinite for subnormal x."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """2 ** x of float32 to 2 ulp, in one instruction; 0 where that is subnormal."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
