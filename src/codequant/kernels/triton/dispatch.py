"""Which kernel runs a problem, and with which block sizes: the measured table, per GPU generation.

Block sizes depend on the tokens that an expert gets on average, which decides between reading weights and multiplying
(for a single matrix: on the number of its results, which decides how many programs there are), and on the activations'
planes, which multiply the products. Measured on an H200, see docs/LOG.md.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class DecodeConfig:
    rows: int  # weight rows per program
    words: int  # 32-bit weight words per row and step, at most
    warps: int


@dataclass(frozen=True)
class Tile:
    """One step of a matrix product on tensor cores."""

    rows: int  # weight rows per program
    bytes: int  # packed bytes of a weight row per step: as many columns of each half
    warps: int
    stages: int
    registers: int | None = None  # per thread at most, so that more programs share a multiprocessor


@dataclass(frozen=True)
class GroupedConfig:
    density: float  # the highest average of tokens per expert that this serves
    tokens: int  # one program serves up to so many tokens of an expert
    up: Tile
    down: Tile
    wide_down: Tile  # down, for rows longer than WIDE


@dataclass(frozen=True)
class LinearConfig:
    """For a single matrix, whose results are few enough that their number decides how finely to cut them."""

    results: float  # tokens times weight rows: the most that this serves
    tokens: int
    tile: Tile


@dataclass(frozen=True)
class DenseConfig:
    """When 16-bit activations meet dequantized weights: one pass over the weights against twice the products, and for
    experts against a few passes over activations, which only long rows are worth."""

    tokens: float  # of an expert on average, or of a matrix
    columns: int  # of a weight row

    def serves(self, tokens: float, columns: int) -> bool:
        return tokens >= self.tokens and columns >= self.columns


@dataclass(frozen=True)
class Generation:
    """Configurations of one GPU generation."""

    decode_up: DecodeConfig
    decode_down: DecodeConfig  # for one token; a program sums its experts
    decode_down_tokens: DecodeConfig  # for several
    decode_down_few: DecodeConfig  # where the experts of a token are one or two
    grouped: dict[int, tuple[GroupedConfig, ...]]  # by planes of the activations, ascending density
    decode_linear: dict[int, DecodeConfig]  # by planes of the activations
    linear: dict[int, tuple[LinearConfig, ...]]  # by planes of the activations, ascending results
    pdl_rows: int  # up to so many rows, kernels use programmatic dependent launch: waiting programs occupy the GPU
    dense_linear: DenseConfig
    dense_experts: DenseConfig

    def pick_down(self, tokens: int, top_k: int) -> DecodeConfig:
        if top_k <= 2:
            return self.decode_down_few
        return self.decode_down if tokens == 1 else self.decode_down_tokens

    def pick(self, planes: int, tokens_per_expert: float) -> GroupedConfig:
        """Configuration for expert-sorted blocks."""
        return next(config for config in self.grouped[planes] if tokens_per_expert <= config.density)

    def pick_linear(self, planes: int, results: int) -> LinearConfig:
        return next(config for config in self.linear[planes] if results <= config.results)


WIDE = 4096
DECODED_TOKENS = 2  # of a single matrix: up to so many, the decode kernel runs it


def decodes(tokens: int, pairs: int, experts: int, planes: int) -> bool:
    """Whether the decode kernel runs a batch: it reads an expert once per pair, the other once per block of tokens."""
    return tokens == 1 or pairs * planes <= experts // 2


_HUGE = float("inf")
_GROUPED: dict[int, tuple[GroupedConfig, ...]] = {
    1: (
        GroupedConfig(16, 16, Tile(64, 128, 4, 4), Tile(64, 128, 4, 3, 96), Tile(64, 128, 4, 3)),
        GroupedConfig(48, 64, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3), Tile(128, 128, 4, 3)),
        GroupedConfig(128, 128, Tile(64, 64, 4, 4), Tile(64, 64, 4, 3, 128), Tile(128, 64, 4, 3)),
        GroupedConfig(_HUGE, 128, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 128), Tile(128, 64, 4, 3)),
    ),
    2: (
        GroupedConfig(16, 16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3), Tile(64, 256, 4, 3)),
        GroupedConfig(48, 64, Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
        GroupedConfig(_HUGE, 64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 128, 4, 3)),
    ),
}
_DECODE_LINEAR = {1: DecodeConfig(8, 128, 4), 2: DecodeConfig(8, 64, 4)}
_FEW = LinearConfig(2**16, 16, Tile(32, 256, 2, 3))
_LINEAR: dict[int, tuple[LinearConfig, ...]] = {
    1: (
        _FEW,
        LinearConfig(2**19, 32, Tile(64, 256, 4, 3)),
        LinearConfig(2**21, 128, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 128, Tile(128, 64, 4, 3)),
    ),
    2: (
        _FEW,
        LinearConfig(2**18, 32, Tile(64, 256, 4, 3)),
        LinearConfig(2**19, 32, Tile(64, 128, 4, 4)),
        LinearConfig(2**21, 64, Tile(64, 128, 4, 3)),
        LinearConfig(_HUGE, 64, Tile(128, 64, 4, 3)),
    ),
}
_DECODE = (DecodeConfig(8, 64, 4), DecodeConfig(8, 64, 8), DecodeConfig(16, 32, 8), DecodeConfig(2, 256, 4))
_DENSE_LINEAR, _DENSE_EXPERTS = DenseConfig(256, 0), DenseConfig(1024, 4096)
HOPPER = Generation(*_DECODE, _GROUPED, _DECODE_LINEAR, _LINEAR, 2048, _DENSE_LINEAR, _DENSE_EXPERTS)
AMPERE = replace(HOPPER, pdl_rows=0)


@cache
def generation(device: torch.device) -> Generation:
    """By compute capability: 9.x and newer are taken as Hopper, all else (and the interpreter) as Ampere or Ada."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return HOPPER
    return AMPERE
