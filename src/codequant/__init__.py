"""codequant: Mixture-of-Experts language models in 4-bit codebook weights."""

from typing import Any

from codequant.runtime.registration import register_with_transformers

__all__ = ["load"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Public functions, imported on first use: they need torch and transformers, which take seconds to import."""
    if name == "load":
        from codequant.runtime.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
