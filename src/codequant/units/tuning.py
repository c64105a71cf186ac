"""Fine-tune centroids, block by block, on what the block hands on; kept only where held-out windows agree.

After a layer's attention, shared experts and dense matrices are quantized, their centroids are trained together; after
its experts are, each expert's are. The reference is always the source model's block on the source model's inputs, so
that a block also learns to make up for the error of its own inputs.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from codequant.finetuning import (
    FinetuneOptions,
    FinetuneResult,
    Parameters,
    dequantize,
    finetune,
    relative_mse,
    router_kl,
)
from codequant.folding import rotate_rows
from codequant.packing import round_codebook
from codequant.units.context import Context
from codequant.units.moments import as_read
from codequant.weight_quantization import QuantizedWeight
from codequant.working_layer import WorkingLayer

STEP_TOKENS = 256  # of an expert, per step


class DenseBatch(NamedTuple):
    """Windows at a layer without its experts."""

    x: Tensor  # [n, T, H] the student's input
    wanted: Tensor  # [n, T, H] the teacher's output in the student's basis
    router_logits: Tensor  # [n, T, E] the teacher's; E = 0 without a router


class ExpertBatch(NamedTuple):
    """Tokens that are routed to one expert."""

    x: Tensor  # [N, H] the student's input, as gate and up read it
    wanted: Tensor  # [N, H] the source expert's output times the routing weights
    share: Tensor  # [N, 1] routing weights


def tune_dense(
    context: Context,
    layer: int,
    teacher_layer: WorkingLayer,
    student_layer: WorkingLayer,
    quantized: dict[str, QuantizedWeight],
) -> dict[str, Any]:
    """Train the centroids of `quantized`, stacks of one by reader; better ones replace it there and in student_layer.

    The loss is the relative error of the layer's output without its experts, every token counting the same (the first
    ones of a window are a thousand times larger in many models), plus the KL of the router's choice.
    """
    structure = context.source.structures[layer].experts
    router = structure.router if structure is not None else None
    router_scheme = context.scheme(layer, router) if router is not None else None

    def batch(shard: int) -> DenseBatch:
        output, handed = teacher_layer.dense_part(context.hidden("teacher", layer, shard), {})
        logits = output[..., :0]
        if router is not None and handed is not None:
            logits = F.linear(handed, teacher_layer.weight(router)).view(*output.shape[:-1], -1)
        return DenseBatch(context.hidden("student", layer, shard), rotate_rows(output, context.rotation), logits)

    def loss(centroids: Parameters, batch: DenseBatch) -> Tensor:
        weights = {f"{r}.weight": dequantize(quantized[r].indices, c)[0] for r, c in centroids.items()}
        output, handed = student_layer.dense_part(batch.x, weights)
        size = batch.wanted.norm(dim=-1, keepdim=True)
        error = relative_mse(output / size, batch.wanted / size)
        if router is None or handed is None:
            return error
        weight = weights.get(f"{router}.weight", student_layer.weight(router))
        logits = F.linear(as_read(handed, router_scheme), weight)
        divergence = router_kl(batch.router_logits.view(logits.shape), logits)
        return error + context.recipe.finetuning.router_weight * divergence

    train, held_out = split(context, [batch(shard) for shard in range(context.window_shards)])
    train = [DenseBatch(*parts) for b in train for parts in zip(*(t.split(1) for t in b))]  # a step for every window
    start = {reader: centroids_of(weight) for reader, weight in quantized.items()}
    result = finetune(start, loss, train, held_out, options(context))
    if result.kept:
        for reader, centroids in result.parameters.items():
            quantized[reader] = with_centroids(quantized[reader], centroids)
            student_layer.replace(reader, quantized[reader].dequantized()[0], None)
    return summary(result)


def tune_experts(
    context: Context,
    layer: int,
    start: int,
    source: dict[str, Tensor],
    quantized: dict[str, QuantizedWeight],
    starved: set[int],
) -> dict[int, dict[str, Any]]:
    """Train the centroids of `quantized` ("gate_up", "down": stacks over experts from `start` on), expert by expert;
    better ones replace it there.

    source: the experts before quantization, with channels in the same order. Starved experts are left alone. Results
    are by expert.
    """
    centroids = {key: centroids_of(weight) for key, weight in quantized.items()}
    report = {}
    for e in range(len(source["down"])):
        if e in starved:
            continue
        own = {key: tensor[e] for key, tensor in source.items()}
        indices = {key: weight.indices[e] for key, weight in quantized.items()}
        result = tune_expert(context, layer, start + e, own, indices, {key: c[e] for key, c in centroids.items()})
        for key, values in result.parameters.items():
            centroids[key][e] = values
        report[start + e] = summary(result)
    for key in quantized:
        quantized[key] = with_centroids(quantized[key], centroids[key])
    return report


def tune_expert(
    context: Context,
    layer: int,
    expert: int,
    source: dict[str, Tensor],
    indices: dict[str, Tensor],
    centroids: Parameters,
) -> FinetuneResult:
    """The loss is the relative error of the expert's output, tokens weighted by their routing weights."""
    outer, inner = (context.experts_scheme(layer, inner=i) for i in (False, True))
    apply_gate, bias = context.apply_gate(layer), source.get("gate_up_bias")

    def batch(routed: dict[str, Tensor]) -> ExpertBatch:
        token, slot = (routed["top_k_index"] == expert).nonzero(as_tuple=True)
        x, source_x = (routed[name][token].to(context.device) for name in ("x", "source_x"))
        share = routed["top_k_weights"][token, slot, None].to(context.device)
        hidden = apply_gate(F.linear(source_x, source["gate_up"], bias))
        return ExpertBatch(as_read(x, outer), F.linear(hidden, source["down"]) * share, share)

    def loss(centroids: Parameters, batch: ExpertBatch) -> Tensor:
        weights = source | {key: dequantize(indices[key], c) for key, c in centroids.items()}
        hidden = apply_gate(F.linear(batch.x, weights["gate_up"], bias))
        return relative_mse(F.linear(as_read(hidden, inner), weights["down"]) * batch.share, batch.wanted)

    train, held_out = split(context, [batch(routed) for routed in context.routed_batches(layer)])
    train = [ExpertBatch(*parts) for b in train for parts in zip(*(t.split(STEP_TOKENS) for t in b))]
    train, held_out = ([b for b in part if len(b.x)] for part in (train, held_out))
    if not train or not held_out:
        return FinetuneResult(centroids, 0.0, 0.0, 0, kept=False)
    return finetune(centroids, loss, train, held_out, options(context))


def options(context: Context) -> FinetuneOptions:
    recipe = context.recipe.finetuning
    return FinetuneOptions(recipe.learning_rate, recipe.epochs, recipe.patience)


def split(context: Context, batches: list) -> tuple[list, list]:
    """Batches to train on, and held-out ones."""
    held_out = context.held_out_shards
    return batches[:-held_out], batches[-held_out:]


def centroids_of(weight: QuantizedWeight) -> Tensor:
    """float32 [B, O, G, K]."""
    return weight.codebook.float() * weight.step.float().unsqueeze(-1)


def with_centroids(weight: QuantizedWeight, centroids: Tensor) -> QuantizedWeight:
    """Rounded to the format. Centroids that came from it are not changed."""
    return QuantizedWeight(weight.indices, *round_codebook(centroids), weight.error)


def summary(result: FinetuneResult) -> dict[str, Any]:
    return {"before": result.heldout_before, "after": result.heldout_after, "kept": result.kept}
