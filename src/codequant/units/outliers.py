"""How far single channels of the normed residual stick out, before and after the rotation: for the report to draw.

Letters: N sampled tokens of a site (one norm of one layer), H channels, S sites, T tokens and C channels of a surface.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.rotation import range_loss

SURFACES = 12  # sites whose activations are kept, spread over the depth; 200 KiB whatever the size of the model
TOKENS = 32
CHANNELS = 128


def ranges(x: Tensor, rotation: Tensor) -> dict[str, float]:
    """Root mean square over tokens of max - min, which is what a step of the quantizer is proportional to; x [N, H]."""
    x = x.float()
    return {"range": float(range_loss(x).sqrt()), "range_rotated": float(range_loss(x @ rotation).sqrt())}


def few(x: Tensor) -> Tensor:
    """float32 [T, H]: some of the tokens [N, H]."""
    return x[:: max(1, len(x) // TOKENS)][:TOKENS].float()


def surface(x: Tensor) -> Tensor:
    """|x| of tokens [T, H] as float16 [T, C]: the largest of each run of channels, so no peak is lost."""
    return F.adaptive_max_pool1d(x.abs(), min(CHANNELS, x.shape[-1])).half()


def spread(count: int) -> list[int]:
    """Indices of at most SURFACES of `count` sites, the first and the last among them."""
    if count <= SURFACES:
        return list(range(count))
    return [round(i * (count - 1) / (SURFACES - 1)) for i in range(SURFACES)]


def surfaces(samples: Sequence[Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """Activations [S, T, C] of the sites `spread` picks, before and after the rotation; samples: [N, H] of each."""
    chosen = [few(samples[i]) for i in spread(len(samples))]
    return {
        "activations": torch.stack([surface(x) for x in chosen]).cpu(),
        "activations.rotated": torch.stack([surface(x @ rotation) for x in chosen]).cpu(),
    }
