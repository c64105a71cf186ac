"""Sizes of the layers of well-known mixtures, for benchmarks of the experts' feed-forward."""

from dataclasses import dataclass

from codequant.errors import InputError


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "mixtral": Shape(4096, 14336, 8, 2),
}


def parse_shape(text: str) -> Shape:
    """A name of SHAPES, or hidden x intermediate x experts x top_k."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != 4 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise InputError(f"shape: {text!r}, expected one of {list(SHAPES)} or HIDDENxINTERMEDIATExEXPERTSxTOP_K")
    return Shape(*map(int, sizes))


def parse_shapes(text: str) -> dict[str, Shape]:
    """Comma-separated shapes by what they are called there."""
    return {name: parse_shape(name) for name in text.split(",")}
