"""Which kernel runs a problem, and with which block sizes: the measured table, per GPU generation.

Block sizes depend on the tokens that an expert gets on average, which decides between reading weights and multiplying
(for a single matrix: on the number of its results, which decides how many programs there are), and on the activations'
form, which decides what a product costs. Measured on an H200, see docs/LOG.md.
"""

import os
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module

import torch

from codequant.errors import InputError
from codequant.kernels.triton.activation import Form
from codequant.kernels.triton.launch import Launch


@dataclass(frozen=True)
class DecodeConfig:
    rows: int  # weight rows per program
    words: int  # 32-bit weight words per row and step, at most
    warps: int
    registers: int | None = None  # per thread at most, where rows have one group and values two planes at most
    ahead: int = 1  # steps whose weights travel while one is multiplied


@dataclass(frozen=True)
class SingleConfig:
    """For one token whose programs quantize it themselves: a multiprocessor holds two."""

    rows: int  # weight rows per tile
    words: int  # 32-bit weight words per row and step, at most
    warps: int
    registers: int  # per thread at most, so that two programs share a multiprocessor


@dataclass(frozen=True)
class Tile:
    """One step of a matrix product on tensor cores."""

    rows: int  # weight rows per program
    bytes: int  # packed bytes of a weight row per step: as many columns of each half
    warps: int
    stages: int
    registers: int | None = None  # per thread at most, so that more programs share a multiprocessor
    overlap: bool = False  # by `overlapped` where it serves the weight: twice the rows, unless gate and up are these
    span: int = 1  # with overlap: blocks of tokens that go through the rows together
    specialized: bool = False  # with overlap: four more warps, which copy, share the registers of the launch


@dataclass(frozen=True)
class GroupedConfig:
    density: float  # the highest average of tokens per expert that this serves
    tokens: int  # one program serves up to so many tokens of an expert
    up: Tile
    down: Tile
    wide_up: Tile  # the same for rows of WIDE columns or more
    wide_down: Tile

    def pick_up(self, columns: int) -> Tile:
        return self.wide_up if columns >= WIDE else self.up

    def pick_down(self, columns: int) -> Tile:
        return self.wide_down if columns >= WIDE else self.down


@dataclass(frozen=True)
class LinearConfig:
    """For a single matrix, whose results are few enough that their number decides how finely to cut them."""

    results: float  # tokens times weight rows: the most that this serves
    tokens: int
    tile: Tile


@dataclass(frozen=True)
class Generation:
    """Configurations of one GPU generation."""

    decode_up: dict[Form, DecodeConfig]
    decode_down: DecodeConfig  # for one token; a program sums its experts
    decode_down_tokens: DecodeConfig  # for several
    decode_down_few: DecodeConfig  # where the experts of a token are one or two
    grouped: dict[Form, tuple[GroupedConfig, ...]]  # ascending density
    single_up: SingleConfig
    single_down: SingleConfig
    single_down_long: SingleConfig  # for rows of more than 1024 columns
    decode_linear: dict[Form, DecodeConfig]
    linear: dict[Form, tuple[LinearConfig, ...]]  # ascending results
    fixed_density: float  # tokens per expert up to which 16-bit activations are fixed point, unless they must be exact
    dense_tokens: int  # from which on a matrix is dequantized for 16-bit activations, unless they must be exact
    early_rows: int  # up to so many rows, kernels start early; 0 if the GPU has no dependent launch
    multiprocessors: int = 2  # the interpreter has none

    def pdl(self, rows: int) -> Launch:
        """Of the kernels of a call with so many rows of activations."""
        if not self.early_rows:
            return Launch.PLAIN
        return Launch.EARLY if rows <= self.early_rows else Launch.CHAINED

    @property
    def routing_pdl(self) -> Launch:
        """Of the kernels that list experts, which are small for any number of pairs."""
        return self.pdl(0)

    def takes_single_up(self, form: Form, top_k: int, rows: int, words: int, groups: int) -> bool:
        """Whether `single_up` runs one token with so many intermediate rows: it keeps its tiles' tables in registers,
        and `single_down` its weights."""
        tiles = top_k * -(-rows // self.single_up.rows)
        return tiles <= SINGLE_TILES * 2 * self.multiprocessors and self.takes_single_down(form, words, groups)

    def takes_single_down(self, form: Form, words: int, groups: int) -> bool:
        return form <= Form.FIXED16 and words <= SINGLE_WORDS and groups == 1

    def pick_single_down(self, columns: int) -> SingleConfig:
        return self.single_down if columns <= 1024 else self.single_down_long

    def pick_decode_down(self, tokens: int, top_k: int) -> DecodeConfig:
        if top_k <= 2:
            return self.decode_down_few
        return self.decode_down if tokens == 1 else self.decode_down_tokens

    def form(self, bits: int, density: float) -> Form:
        """Of activations that meet expert-sorted blocks."""
        if bits < 16:
            return Form.LEVELS
        return Form.FLOAT16 if exact_a16() or density > self.fixed_density else Form.FIXED16

    def pick(self, bits: int, tokens: int, pairs: int, experts: int) -> GroupedConfig | None:
        """Expert-sorted blocks for a layer whose wider activations have so many bits; None for the decode kernel, which
        reads an expert once per pair, the other once per block of tokens."""
        density = pairs / experts
        if tokens == 1 or density <= DECODED_DENSITY[decode_form(bits)]:
            return None
        return next(config for config in self.grouped[self.form(bits, density)] if density <= config.density)

    def pick_linear(self, form: Form, results: int) -> LinearConfig:
        return next(config for config in self.linear[form] if results <= config.results)


WIDE = 4096
SINGLE_WORDS, SINGLE_TILES = 256, 4  # of a row, and per program: what fits in its registers
DECODED_DENSITY = {Form.LEVELS: 0.7, Form.FIXED16: 0.4, Form.FIXED24: 0.25}  # tokens per expert, up to so many
DECODED_TOKENS = 2  # of a single matrix: up to so many, the decode kernel runs it


def exact_a16() -> bool:
    """Whether CODEQUANT_A16 asks for 16-bit activations as they are ("exact") instead of, where that is faster, in 16
    bits of fixed point, or in float16 of a range that is known beforehand ("fast", the default)."""
    mode = os.environ.get("CODEQUANT_A16", "fast")
    if mode not in ("fast", "exact"):
        raise InputError(f"CODEQUANT_A16: {mode!r}, expected fast or exact")
    return mode == "exact"


def decode_form(bits: int) -> Form:
    """Of activations that meet the decode kernel."""
    if bits < 16:
        return Form.LEVELS
    return Form.FIXED24 if exact_a16() else Form.FIXED16


_HUGE = float("inf")


def _uniform(density: float, tokens: int, up: Tile, down: Tile) -> GroupedConfig:
    return GroupedConfig(density, tokens, up, down, up, down)


_LEVELS = (
    GroupedConfig(12, 16, Tile(64, 128, 4, 4), Tile(64, 128, 4, 3, 96), Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)),
    _uniform(24, 32, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
    _uniform(48, 64, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3)),
    GroupedConfig(128, 128, Tile(64, 64, 4, 4), Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 4), Tile(128, 64, 4, 3)),
    GroupedConfig(_HUGE, 128, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
)
_FIXED16 = (
    GroupedConfig(16, 16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 4)),
    _uniform(48, 64, Tile(64, 64, 4, 4), Tile(64, 128, 4, 3)),
    GroupedConfig(_HUGE, 64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 128, 4, 3)),
)
_FLOAT16 = (
    _uniform(16, 16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
    _uniform(_HUGE, 64, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
)

_overlap = partial(Tile, overlap=True)
_plain = partial(_overlap, 64, 64, 4, 4)
_plain_8 = partial(_overlap, 128, 64, 8, 4)
_specialized_8 = partial(_plain_8, 168, specialized=True)
_wide_down = partial(_overlap, 64, 128, 4)
_LEVELS_90 = (
    replace(_uniform(12, 16, _plain(128), _plain(128)), wide_down=_wide_down(4, 168)),
    GroupedConfig(24, 32, _overlap(64, 64, 4, 6), _plain(128), _plain(), _wide_down(3)),
    replace(_uniform(56, 64, _plain(168), _plain(168)), wide_down=_wide_down(3)),
    GroupedConfig(96, 128, _plain(), _plain(span=4), _plain(), _plain_8()),
    GroupedConfig(_HUGE, 128, _plain(), _plain(span=4), _plain_8(span=8), _specialized_8()),
)
_FIXED16_90 = (
    replace(_uniform(12, 16, _overlap(64, 64, 4, 6, 168), _plain(128)), wide_down=_wide_down(4, 168)),
    replace(_uniform(24, 32, _plain(), _plain(168)), wide_down=_wide_down(3)),
    GroupedConfig(48, 64, _plain(), _overlap(64, 64, 4, 3), _plain_8(), _plain_8()),
)
_FLOAT16_90 = (
    _uniform(16, 16, _plain(), _plain()),
    _uniform(24, 32, _plain(), _plain()),
    _uniform(56, 64, _plain(), _plain()),
    replace(_uniform(_HUGE, 128, _specialized_8(), _specialized_8()), wide_up=_specialized_8(span=8)),
)

_FEW = LinearConfig(2**16, 16, Tile(32, 256, 2, 3))
_LINEAR: dict[Form, tuple[LinearConfig, ...]] = {
    Form.LEVELS: (
        _FEW,
        LinearConfig(2**19, 64, Tile(64, 256, 4, 3)),
        LinearConfig(2**20, 64, Tile(64, 128, 4, 4)),
        LinearConfig(2**21, 128, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 128, Tile(128, 64, 4, 3)),
    ),
    Form.FIXED16: (
        _FEW,
        LinearConfig(2**18, 32, Tile(64, 256, 4, 3)),
        LinearConfig(2**19, 32, Tile(64, 128, 4, 4)),
        LinearConfig(2**21, 64, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 64, Tile(128, 64, 4, 3)),
    ),
    Form.FLOAT16: (
        _FEW,
        LinearConfig(2**19, 32, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 64, Tile(64, 64, 4, 3)),
    ),
}
_LINEAR_90 = {
    Form.LEVELS: (
        _FEW, LinearConfig(2**17, 32, Tile(64, 128, 4, 4)), *_LINEAR[Form.LEVELS][1:-1],
        LinearConfig(_HUGE, 128, _overlap(64, 64, 4, 3, span=8)),
    ),
    Form.FIXED16: _LINEAR[Form.FIXED16],
    Form.FLOAT16: (
        *_LINEAR[Form.FLOAT16][:-1], LinearConfig(2**21, 64, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 128, _specialized_8()),
    ),
}  # fmt: skip

AMPERE = Generation(
    decode_up={
        Form.LEVELS: DecodeConfig(4, 64, 4, 56, ahead=4),
        Form.FIXED16: DecodeConfig(4, 64, 4, 64, ahead=4),
        Form.FIXED24: DecodeConfig(8, 64, 4),
    },
    decode_down=DecodeConfig(8, 64, 8),
    decode_down_tokens=DecodeConfig(4, 32, 4, 64),
    decode_down_few=DecodeConfig(2, 256, 4),
    grouped={Form.LEVELS: _LEVELS, Form.FIXED16: _FIXED16, Form.FLOAT16: _FLOAT16},
    single_up=SingleConfig(8, 128, 8, 128),
    single_down=SingleConfig(8, 32, 8, 128),
    single_down_long=SingleConfig(8, 16, 8, 128),
    decode_linear={
        Form.LEVELS: DecodeConfig(8, 64, 4, ahead=4),
        Form.FIXED16: DecodeConfig(8, 64, 4, 64, ahead=2),
        Form.FIXED24: DecodeConfig(8, 64, 4),
    },
    linear=_LINEAR,
    fixed_density=_HUGE,
    dense_tokens=256,
    early_rows=0,
)  # fmt: skip
HOPPER = replace(
    AMPERE,
    grouped={Form.LEVELS: _LEVELS_90, Form.FIXED16: _FIXED16_90, Form.FLOAT16: _FLOAT16_90},
    linear=_LINEAR_90,
    fixed_density=48,
    early_rows=8192,
)
NEWER = replace(AMPERE, early_rows=HOPPER.early_rows)  # without the instructions, or the dialect, of `overlapped`


def _has_gluon() -> bool:
    """Triton's explicit dialect is experimental: another version may lack what `overlapped` imports."""
    try:
        import_module("codequant.kernels.triton.overlapped")
    except ImportError:
        return False
    return True


@cache
def generation(device: torch.device) -> Generation:
    """By compute capability; below 9, and in the interpreter, as Ampere."""
    if device.type != "cuda":
        return AMPERE
    properties = torch.cuda.get_device_properties(device)
    chip = AMPERE if properties.major < 9 else HOPPER if properties.major == 9 and _has_gluon() else NEWER
    return replace(chip, multiprocessors=properties.multi_processor_count)
