from dataclasses import dataclass

import torch

from codequant.clustering import kmeans
from codequant.packing import round_codebook


@dataclass(frozen=True)
class WeightOptions:
    bits: int = 4
    group_size: int = -1
    method: str = "hessian"
    rounds: int = 2
    sweeps: int = 3


@dataclass
class QuantizedWeight:
    indices: object
    codebook: object
    step: object
    error: object


def target_weight(W, H, C, a):
    return W + a * (torch.linalg.solve(H.double(), (W.double() @ C.double()).mT).mT.float() - W)


def quantize_weight(weight, hessian, target, options):
    B, O, I = weight.shape
    S = I if options.group_size == -1 else options.group_size
    t = weight if target is None else target
    d = torch.diagonal(hessian, dim1=-2, dim2=-1).expand(B, I)[:, None].expand(B, O, I).reshape(-1, S)
    c, i = kmeans(t.reshape(-1, S).contiguous(), d.contiguous(), 2**options.bits)
    cb, st = round_codebook(c.view(B, O, I // S, -1))
    v = (cb.float() * st.float()[..., None]).gather(-1, i.view(B, O, I // S, S).long()).view(B, O, I)
    e = v - weight
    h = hessian.expand(B, I, I)
    return QuantizedWeight(i.view(B, O, I), cb, st, ((e @ h) * e).sum((1, 2)) / ((weight @ h) * weight).sum((1, 2)))
