"""A finished quantized folder, checked, and read one weight at a time."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from codequant import packing
from codequant.checkpoint_names import matrices, parameter_sources, skeleton
from codequant.packing import PackedWeight
from codequant.quantization_config import Scheme
from codequant.source import Checkpoint
from codequant.verification import check_tensors, read_config

Read = Callable[[str], Tensor | PackedWeight]


class QuantizedFolder:
    """`names` are the tensors of the plain model that the folder stands for."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError or VerificationError where the folder is not whole."""
        check_tensors(folder)
        self.path = folder
        self.config, self.quantization = read_config(folder)
        model = skeleton(self.config)
        sources = parameter_sources(model)
        self.matrices = matrices(model, sources)
        self.checkpoint = Checkpoint(folder)
        quantized = {name for name in self.matrices if self.scheme(name) is not None}
        parts = {f"{name}_{suffix}" for name in quantized for suffix in packing.SUFFIXES}
        self.names = sorted(quantized | (self.checkpoint.entries.keys() - parts))

    def scheme(self, name: str) -> Scheme | None:
        """How a tensor is quantized, or None where it is stored as it is."""
        matrix = self.matrices.get(name)
        return None if matrix is None else self.quantization.scheme(matrix.source.module)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the plain tensor."""
        matrix = self.matrices.get(name)
        return self.checkpoint.entry(name).shape if matrix is None else matrix.source.shape

    def read(self, name: str) -> Tensor | PackedWeight:
        """A tensor by its plain name; a PackedWeight, in rows of output channels [..., O, I], where it is quantized."""
        if self.scheme(name) is None:
            return self.checkpoint.read(name)
        packed, codebook, step = (self.checkpoint.read(f"{name}_{suffix}") for suffix in packing.SUFFIXES)
        return PackedWeight(packed, codebook, step, self.matrices[name].in_features)
