"""The compute kernels, one module per backend behind one interface, and the one function that chooses among them.

`reference` is readable PyTorch and defines every result; `cpu` is the native library; `triton` the GPU kernels.
"""

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from codequant.errors import InputError
from codequant.kernels.reference import FULL_PRECISION, ExpertWeights
from codequant.packing import PackedWeight

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")
PREFERRED = {"cpu": "cpu", "cuda": "triton"}  # by device type; anything else, or where it cannot run: reference


class Backend(Protocol):
    """What a module of this package offers. Weights go through `prepare_*` once, on the device where they will be used,
    into whatever layout the kernels want; the caller then drops the original and gets it back from `restore`."""

    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot run on such a device here, or None where it can."""

    def prepare_linear(self, weight: PackedWeight, /) -> Any:
        """One matrix [O, I], ready for `linear`."""

    def linear(
        self,
        x: Tensor,
        prepared: Any,
        /,
        bias: Tensor | None = None,
        activation_bits: int = FULL_PRECISION,
        clip: float = 1.0,
    ) -> Tensor:
        """x [..., I] -> [..., O] in x's dtype, as `reference.codebook_linear`."""

    def prepare_experts(self, experts: ExpertWeights, /) -> Any:
        """The experts of one layer, ready for `experts`."""

    def experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, prepared: Any, /) -> Tensor:
        """x [T, I], top_k_* [T, k] -> [T, O] in x's dtype, as `reference.codebook_experts`."""

    def restore(self, prepared: Any, /) -> PackedWeight | ExpertWeights:
        """What `prepare_linear` or `prepare_experts` was given, bit for bit; parts come back joined."""


def backend(device_type: str) -> Backend:
    """The kernels for tensors on such a device ("cpu", "cuda"): the fastest that can run here, or the one that the
    environment variable CODEQUANT_BACKEND names. Raises InputError where that one is unknown or cannot run."""
    return _choose(device_type, os.environ.get("CODEQUANT_BACKEND"))


@cache
def _choose(device_type: str, forced: str | None) -> Backend:
    if forced is not None and forced not in BACKENDS:
        raise InputError(f"CODEQUANT_BACKEND: {forced!r}, expected one of {BACKENDS}")
    name = forced or PREFERRED.get(device_type, "reference")
    module, reason = _load(name, device_type)
    if module is None:
        if forced is not None:
            raise InputError(f"CODEQUANT_BACKEND: {name!r} cannot run on {device_type!r}: {reason}")
        logger.warning("%s kernels cannot run on %s (%s): using the slow reference", name, device_type, reason)
        name, (module, _) = "reference", _load("reference", device_type)
    else:
        logger.info("kernels on %s: %s", device_type, name)
    assert module is not None  # the reference runs everywhere
    return module


def _load(name: str, device_type: str) -> tuple[Backend | None, str | None]:
    """(module, None), or (None, the reason why it cannot run)."""
    try:
        module = cast(Backend, import_module(f"{__name__}.{name}"))
    except ImportError as error:
        return None, str(error)
    reason = module.unavailable(device_type)
    return (module, None) if reason is None else (None, reason)
