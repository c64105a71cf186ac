"""The plain checkpoint that a quantized folder stands for: its own tensor names, quantized weights rounded to bfloat16.

A weight stored in the basis of the online Hadamard transform goes back to its own: x H (W H)^T = x W^T.
"""

import json
import shutil
from functools import cache
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from codequant import packing
from codequant.export.folder import QuantizedFolder
from codequant.hadamard import hadamard_matrix
from codequant.packing import PackedWeight
from codequant.source import INDEX, SIDE_FILES
from codequant.verification import DTYPES

SHARD_BYTES = 4 << 30  # a shard is held in memory while it is written
NOT_COPIED = {"config.json", INDEX, "codequant.json", "timings.json"}


def write(folder: Path, out: Path) -> None:
    """Write the folder `out`, which must not exist."""
    model = QuantizedFolder(folder)
    shards = split(model, SHARD_BYTES)
    out.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        tensors = {name: plain(model, name, model.read(name)) for name in names}
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for pattern in (*SIDE_FILES, "LICENSE*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, out / path.name)


def split(model: QuantizedFolder, limit: int) -> list[list[str]]:
    """The names of each shard: in order, as many as fit into `limit` bytes, at least one."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in model.names:
        dtype = torch.bfloat16 if model.scheme(name) else DTYPES[model.checkpoint.entry(name).dtype]
        size = prod(model.shape(name)) * dtype.itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def plain(model: QuantizedFolder, name: str, weight: Tensor | PackedWeight) -> Tensor:
    """The tensor as the plain checkpoint stores it."""
    if isinstance(weight, Tensor):
        return weight
    W = packing.unpack(weight)  # [..., O, I]
    scheme = model.scheme(name)
    if scheme is not None and scheme.hadamard:
        W = W @ _hadamard(weight.in_features).T
    if model.matrices[name].transposed:
        W = W.mT
    return W.to(torch.bfloat16).contiguous()


@cache
def _hadamard(n: int) -> Tensor:
    return hadamard_matrix(n).float()
