"""The units of work of a run, in the order of the recipe. Each is a pure function of the results that it names.

    embed(w)          token windows -> hidden states of the source model (the teacher)
    teacher(l, w)     one layer of the teacher, and samples of its normed residual
    rotation          R from the samples
    sensitivity(l)    what a layer's experts cost the model at 2, 3 and 4 bits, where the recipe has a target for them
    allocation        the bits of every expert
    ends              embedding, final norm and head in the new basis
    enter(w)          token windows -> hidden states of the quantized model (the student)
    dense(l)          quantize a layer's attention, shared experts and dense matrices
    route(l, w)       what the layer's experts are handed, in both models
    experts(l, s)     quantize a shard of the layer's experts
    layer(l)          the layer's final tensors: one shard of the output
    student(l, w)     one layer of the student

w counts shards of calibration windows and s shards of experts; both are fixed by the recipe and the model, never by
the machine, so results do not depend on how many workers there are.

With `weights.inputs: source` there is no student stream: no `enter` and `student`, and no layer waits for another.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from codequant.executor import Unit, measure
from codequant.store import Record
from codequant.units.context import (
    ALLOCATION,
    WINDOWS,
    Context,
    Result,
    dense_key,
    experts_key,
    hidden_key,
    layer_key,
    route_key,
    sensitivity_key,
)
from codequant.units.dense import dense
from codequant.units.ends import ends, enter, learn_rotation
from codequant.units.experts import experts, route
from codequant.units.sensitivity import allocation, sensitivity
from codequant.units.student import layer, student
from codequant.units.teacher import embed, teacher

__all__ = ["FUNCTIONS", "WINDOWS", "Context", "graph", "layer_key", "run_unit"]

FUNCTIONS: dict[str, Callable[..., Result]] = {
    "embed": embed,
    "teacher": teacher,
    "rotation": learn_rotation,
    "sensitivity": sensitivity,
    "allocation": allocation,
    "ends": ends,
    "enter": enter,
    "dense": dense,
    "route": route,
    "experts": experts,
    "layer": layer,
    "student": student,
}


def graph(context: Context) -> list[Unit]:
    """Every unit of a run in topological order. Kept results are the output."""
    shards, layers = range(context.window_shards), range(context.source.num_layers)
    units = [Unit(hidden_key("teacher", 0, w), "embed", {"shard": w}) for w in shards]
    for l in layers:
        units += [
            Unit(hidden_key("teacher", l + 1, w), "teacher", {"layer": l, "shard": w}, (hidden_key("teacher", l, w),))
            for w in shards
        ]
    basis: tuple[str, ...] = ()
    if context.rotates:
        samples = tuple(hidden_key("teacher", l + 1, w) for l in layers for w in shards)
        units.append(Unit("rotation", "rotation", needs=samples, keep=True))
        basis = ("rotation",)
    bits: tuple[str, ...] = ()
    if context.allocates:
        for l in context.experts_by_layer:
            both = tuple(hidden_key("teacher", depth, w) for depth in (l, l + 1) for w in shards)
            units.append(Unit(sensitivity_key(l), "sensitivity", {"layer": l}, (*basis, *both)))
        measured = tuple(sensitivity_key(l) for l in context.experts_by_layer)
        units.append(Unit(ALLOCATION, "allocation", needs=measured, keep=True))
        bits = (ALLOCATION,)
    units.append(Unit("ends", "ends", needs=basis, keep=True))
    streams = ("teacher",) if context.calibrates_on_source else ("teacher", "student")
    if "student" in streams:
        units += [Unit(hidden_key("student", 0, w), "enter", {"shard": w}, ("ends",)) for w in shards]
    for l in layers:
        inputs = tuple(hidden_key(stream, l, w) for stream in streams for w in shards)
        units.append(Unit(dense_key(l), "dense", {"layer": l}, (*basis, *inputs)))
        parts = [dense_key(l)]
        if runs := context.expert_shards(l):
            units += [
                Unit(
                    route_key(l, w),
                    "route",
                    {"layer": l, "shard": w},
                    (*basis, dense_key(l), *(hidden_key(stream, l, w) for stream in streams)),
                )
                for w in shards
            ]
            routed = tuple(route_key(l, w) for w in shards)
            for s, run in enumerate(runs):
                arguments = {"layer": l, "start": run.start, "stop": run.stop}
                units.append(Unit(experts_key(l, s), "experts", arguments, (*basis, *bits, dense_key(l), *routed)))
                parts.append(experts_key(l, s))
        units.append(Unit(layer_key(l), "layer", {"layer": l}, tuple(parts), keep=True))
        if "student" in streams and l + 1 < len(layers):
            units += [
                Unit(
                    hidden_key("student", l + 1, w),
                    "student",
                    {"layer": l, "shard": w},
                    (*basis, layer_key(l), hidden_key("student", l, w), hidden_key("teacher", l + 1, w)),
                )
                for w in shards
            ]
    return units


def run_unit(context: Context, unit: Unit) -> Record:
    """Compute a unit and write its result."""
    with torch.no_grad() if unit.function != "rotation" else nullcontext():
        return measure(unit, lambda: FUNCTIONS[unit.function](context, **unit.arguments), context.store.write)
