"""Fine-tuning codebook entries for fixed indices: gradient descent on a layer's output error, kept only if it helps.

`finetune` moves any float32 parameters - centroids, norm gains, biases - to lower a loss. The published method takes
plain gradient steps of 1e-3 in bfloat16, which vanish below its resolution; here Adam steps in float32 are relative to
each parameter's size. Two guards against fitting the calibration tokens: a held-out split decides when to stop, and a
result that does not lower its loss is dropped for the original, bit for bit. The loss should call `dequantize`, which
rounds entries to int8 as the format will, so that both judgements are about what is stored.

Letters: O rows, I columns, G column groups, K entries, T tokens, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant.packing import round_codebook

Batch = TypeVar("Batch")
Parameters = dict[str, Tensor]


class _Lookup(torch.autograd.Function):
    """Gather along codebooks. torch.gather would keep int64 indices for its backward pass, 8 bytes a weight, and add
    gradients in no fixed order on a GPU; this keeps the uint8 ones and sums entry by entry."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.codebook_shape = codebook.shape
        return codebook.gather(-1, indices.unflatten(-1, (codebook.shape[-2], -1)).long()).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        G, K = ctx.codebook_shape[-2:]
        gradient, grouped = gradients[0].unflatten(-1, (G, -1)), indices.unflatten(-1, (G, -1))  # [..., O, G, S]
        return torch.stack([torch.where(grouped == k, gradient, 0).sum(-1) for k in range(K)], dim=-1), None


def dequantize(indices: Tensor, centroids: Tensor) -> Tensor:
    """Weight float32 [..., O, I] of indices uint8 [..., O, I] and centroids float32 [..., O, G, K].

    It is the weight as it will be stored: entries are rounded to int8 times a float16 step. The gradient passes the
    rounding straight through.
    """
    entries, step = round_codebook(centroids.detach())
    rounded = entries.to(centroids.dtype) * step.to(centroids.dtype).unsqueeze(-1)
    return _Lookup.apply(centroids + (rounded - centroids).detach(), indices)


def relative_mse(output: Tensor, reference: Tensor) -> Tensor:
    """sum (output - reference)^2 / sum reference^2 in float32: the loss of an attention block."""
    reference = reference.float()
    return (output.float() - reference).square().sum() / reference.square().sum()


def router_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(teacher) || softmax(student)), in nats; logits [..., E]."""
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    student = F.log_softmax(student_logits.float(), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def moe_loss(
    output: Tensor,
    reference: Tensor,
    router_logits: Tensor,
    reference_router_logits: Tensor,
    router_weight: float = 1.0,
) -> Tensor:
    """relative_mse of the block's output [T, O] + router_weight * router_kl of its router's logits [T, E]."""
    return relative_mse(output, reference) + router_weight * router_kl(reference_router_logits, router_logits)


@dataclass(frozen=True)
class FinetuneOptions:
    learning_rate: float = 3e-3  # of Adam, relative to a parameter's root mean square over its last dimension
    epochs: int = 8  # at most; the rate falls to zero over them along a cosine
    patience: int = 2  # epochs without a better held-out loss before giving up

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate}, expected a positive number")
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class FinetuneResult:
    parameters: Parameters  # the tensors that were given, where not kept
    heldout_before: float
    heldout_after: float  # never above heldout_before
    steps: int  # taken, including those after the best epoch
    kept: bool


def finetune(
    parameters: Parameters,
    loss: Callable[[Parameters, Batch], Tensor],
    train_batches: Sequence[Batch],
    heldout_batches: Sequence[Batch],
    options: FinetuneOptions,
) -> FinetuneResult:
    """Lower the mean of loss(parameters, batch) over train_batches, as judged by its mean over heldout_batches.

    parameters: float32 tensors [..., K]; rows that are zero stay zero. The batches are visited in the given order, so
    the result is as deterministic as the loss.
    """
    for name, batches in (("train_batches", train_batches), ("heldout_batches", heldout_batches)):
        if not len(batches):
            raise ValueError(f"{name}: empty, expected at least one batch")
    start = {name: value.detach() for name, value in parameters.items()}
    scale = {name: value.square().mean(-1, keepdim=True).sqrt() for name, value in start.items()}
    change = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}

    def current() -> Parameters:
        return {name: start[name] + scale[name] * change[name] for name in start}

    def heldout_loss(values: Parameters) -> float:
        with torch.no_grad():
            return math.fsum(float(loss(values, batch)) for batch in heldout_batches) / len(heldout_batches)

    before = best = heldout_loss(start)
    result, steps, epochs_without_gain = parameters, 0, 0
    total_steps = options.epochs * len(train_batches)
    # One entry among a million moves a relative loss by 1e-8 or less: the usual eps would hold it back.
    optimizer = torch.optim.Adam(change.values(), betas=(0.9, 0.95), eps=1e-15)
    for _ in range(options.epochs):
        for batch in train_batches:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * steps / total_steps))
            with torch.enable_grad():
                optimizer.zero_grad()
                loss(current(), batch).backward()
            optimizer.step()
            steps += 1
        values = {name: value.detach() for name, value in current().items()}
        now = heldout_loss(values)
        if now < best:  # false for NaN
            result, best, epochs_without_gain = values, now, 0
        else:
            epochs_without_gain += 1
            if epochs_without_gain == options.patience:
                break
    return FinetuneResult(result, before, best, steps, kept=result is not parameters)
