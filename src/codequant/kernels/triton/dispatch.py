"""Which kernel runs a problem, and with which block sizes: the measured table, per GPU generation.

Block sizes are chosen by the tokens that an expert gets on average, which is what decides between reading weights and
multiplying; the numbers are from `codequant bench gpu --tune`, see docs/LOG.md.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class DecodeConfig:
    rows: int  # weight rows per program
    words: int  # 32-bit weight words per row and step
    warps: int


@dataclass(frozen=True)
class Tile:
    """One step of a matrix product on tensor cores."""

    rows: int  # weight rows per program
    bytes: int  # packed bytes of a weight row per step: as many columns of each half
    warps: int
    stages: int


@dataclass(frozen=True)
class GroupedConfig:
    tokens: int  # one program serves up to so many tokens of an expert
    up: Tile
    down: Tile  # also for single matrices
    rows_first: bool = True  # consecutive programs take consecutive row blocks; else consecutive token blocks


@dataclass(frozen=True)
class Generation:
    """Configurations of one GPU generation."""

    decode_tokens: int  # batches up to this size use the decode kernel
    decode_up: DecodeConfig
    decode_down: DecodeConfig
    grouped: tuple[tuple[float, GroupedConfig], ...]  # by the highest average of tokens per expert that each serves
    pdl: bool  # programmatic dependent launch

    def pick(self, tokens_per_expert: float) -> GroupedConfig:
        return next(config for limit, config in self.grouped if tokens_per_expert <= limit)


_GROUPED = (
    (16, GroupedConfig(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))),
    (48, GroupedConfig(32, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))),
    (96, GroupedConfig(64, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))),
    (float("inf"), GroupedConfig(128, Tile(64, 64, 4, 4), Tile(128, 64, 8, 3), rows_first=False)),
)
HOPPER = Generation(4, DecodeConfig(4, 256, 4), DecodeConfig(4, 128, 4), _GROUPED, pdl=True)
AMPERE = Generation(4, DecodeConfig(4, 256, 4), DecodeConfig(4, 128, 4), _GROUPED, pdl=False)


@cache
def generation(device: torch.device) -> Generation:
    """By compute capability: 9.x and newer are taken as Hopper, all else (and the interpreter) as Ampere or Ada."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return HOPPER
    return AMPERE
