"""Quantize everything of a layer but its experts, and prove first that rotating the layer changed nothing."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from codequant.errors import InvarianceError
from codequant.folding import head_blocks, rotate_rows
from codequant.permutation import move_columns, move_rows, pair_order, producer_order
from codequant.structure import ChannelPair
from codequant.units.context import Context, Result
from codequant.units.matrices import (
    local_tensors,
    packed_one,
    packed_tensors,
    plain_tensors,
    quantize,
    reorder_rows,
    split_rows,
)
from codequant.units.moments import accumulate, as_read
from codequant.units.teacher import source_experts
from codequant.units.tuning import tune_dense
from codequant.weight_quantization import QuantizedWeight
from codequant.working_layer import Experts, WorkingLayer

PROOF_TOKENS = 4
PROOF_TOLERANCE = 1e-5  # float32, relative


def dense(context: Context, layer: int) -> Result:
    """Quantize everything of a layer but its experts, site by site in execution order, each on the inputs that the
    sites before it, already quantized, hand on. Their centroids are then fine-tuned together, where the recipe says so.
    Also the all-token moments of the experts' input."""
    structure = context.source.structures[layer]
    tensors = context.folded_tensors(layer, context.rotation)
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    student_layer = context.working_layer(layer, tensors)
    info: dict[str, Any] = {"proof": prove(context, layer, teacher_layer, student_layer), "errors": {}}
    plain = plain_tensors(context, layer, tensors)
    student_layer = context.working_layer(layer, tensors | local_tensors(context, layer, plain))
    done: dict[str, QuantizedWeight] = {}  # by reader, stacks of one
    for site in structure.sites:
        readers = [r for r in site.readers if context.scheme(layer, r) is not None]
        if not readers:
            continue
        scheme = context.scheme(layer, readers[0])
        assert scheme is not None
        basis = context.rotation if site.norm is not None else None

        def inputs(shard: int, reader: str = readers[0], basis: Tensor | None = basis) -> tuple[Tensor, Tensor]:
            student = student_layer.input_of(reader, context.hidden("student", layer, shard))
            source = teacher_layer.input_of(reader, context.hidden("teacher", layer, shard))
            return student, rotate_rows(source, basis)

        moments = accumulate((inputs(shard) for shard in range(context.window_shards)), scheme)
        weight = torch.cat([student_layer.weight(r) for r in readers])
        rows = [student_layer.weight(r).shape[0] for r in readers]
        pair = next((p for p in structure.pairs if p.consumer in readers), None)
        if pair is not None and context.permutes(layer, pair):
            diagonal = moments.hessian.diagonal()
            order = pair_order(weight, diagonal, head_blocks(pair), scheme.group_size, scheme.bits, threads=1)
            weight, moments = move_columns(weight, order), moments.moved(order)
            move_producers(context, layer, pair, order, student_layer, done, plain)
        quantized = quantize(context, scheme, weight[None], moments)
        for reader, part in zip(readers, split_rows(quantized, rows)):
            done[reader] = part
            student_layer.replace(reader, part.dequantized()[0], partial(as_read, scheme=scheme))
            info["errors"][context.module_name(layer, reader)] = float(quantized.error[0])
    if context.recipe.finetuning.epochs:
        info["finetuning"] = tune_dense(context, layer, teacher_layer, student_layer, done)
    result = dict(plain)
    for reader, quantized in done.items():
        result |= packed_tensors(
            f"{context.module_name(layer, reader)}.weight", packed_one(quantized, 0, context.recipe.weights.bits)
        )
    if structure.experts is not None:
        scheme = context.experts_scheme(layer, inner=False)

        def handed(shard: int) -> tuple[Tensor, Tensor]:
            student = student_layer.routed(context.hidden("student", layer, shard)).x
            source = teacher_layer.routed(context.hidden("teacher", layer, shard)).x
            return student, rotate_rows(source, context.experts_basis(layer))

        moments = accumulate((handed(shard) for shard in range(context.window_shards)), scheme)
        result |= {"moments.hessian": moments.hessian.cpu(), "moments.cross": moments.cross.cpu()}
    return result, info


def move_producers(
    context: Context,
    layer: int,
    pair: ChannelPair,
    order: Tensor,
    student_layer: WorkingLayer,
    done: dict[str, QuantizedWeight],
    plain: dict[str, Tensor],
) -> None:
    """Let the producers' output channels follow the consumer's columns, in the order int64 [I], wherever they are."""
    prefix = context.source.layer_names[layer]
    for producer in pair.producers:
        rows = producer_order(order, pair.row_of_column, student_layer.weight(producer).shape[0])
        student_layer.move_outputs(producer, rows)
        if producer in done:
            done[producer] = reorder_rows(done[producer], rows[None])
        for path in (f"{producer}.weight", f"{producer}.bias"):
            for entry in context.source.sources.get(f"{prefix}.{path}", ()):
                if entry.name in plain:
                    plain[entry.name] = move_rows(plain[entry.name], rows.cpu())


def prove(context: Context, layer: int, teacher_layer: WorkingLayer, student_layer: WorkingLayer) -> float:
    """Relative difference between the layer in the new basis and the source's, in float32 on real tokens.

    Both layers are unquantized here. All tokens of one window go through attention; the experts, which are costly to
    rotate, are compared on its last tokens. Raises InvarianceError if the paths part.
    """
    x, rotation = context.hidden("teacher", layer, 0)[:1], context.rotation

    def on_last_tokens(basis: Tensor | None) -> Experts | None:
        if (run := source_experts(context, layer, basis)) is None:
            return None

        def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[-PROOF_TOKENS:] = run(*(t[-PROOF_TOKENS:] for t in (x, top_k_index, top_k_weights)))
            return y

        return experts

    expected = rotate_rows(teacher_layer.run(x, on_last_tokens(None)), rotation)[:, -PROOF_TOKENS:]
    got = student_layer.run(rotate_rows(x, rotation), on_last_tokens(rotation))[:, -PROOF_TOKENS:]
    error = float((got - expected).norm() / expected.norm())
    if not error <= PROOF_TOLERANCE:
        raise InvarianceError(
            f"{context.source.layer_names[layer]}: the rotated layer differs from the source by {error:.2e}, "
            f"expected at most {PROOF_TOLERANCE:g}; --set rotation.method=none quantizes without a rotation"
        )
    return error
