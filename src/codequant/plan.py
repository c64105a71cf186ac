"""What a run will need, before it starts: memory, disk and time, from the config and the shards' headers alone.

The graph of units is walked as the executor walks it, with the work of every unit counted in floating-point operations
and bytes, and turned into seconds by rates that a few seconds of measuring give on the machine at hand. Peak memory is
that of the units that run side by side, peak disk that of the results that are alive.

Letters: N calibration tokens, n of one unit, T of one window, H hidden and M intermediate channels, E experts of which k
see a token, V words of the vocabulary, O and I output and input channels.
"""

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import psutil
import torch

from codequant.executor import Unit
from codequant.packing import groups_per_row
from codequant.schemes import matrices
from codequant.units import Context, graph
from codequant.weight_quantization import WeightOptions, quantize_weight

SAMPLE_WIDTH = 768  # of the matrix that is quantized to measure rates
SAMPLE_ROWS = (8, 136)
UNIT_SECONDS = 0.004  # two synced files and the bookkeeping of a unit


@dataclass(frozen=True)
class Rates:
    """What one worker does per second."""

    product: float  # floating-point operations in float32 matrix products
    double: float  # likewise in float64 factorisations
    copy: float  # bytes that elementwise passes read and write
    row: float  # seconds to quantize one weight, per input channel of its row: sweeps are quadratic in the row
    matrix: float  # seconds per matrix beside its rows, over the cube of its input channels


@dataclass(frozen=True)
class Work:
    """One unit of work."""

    products: float = 0.0  # float32 operations
    passes: float = 0.0  # bytes read and written by elementwise passes
    rows: float = 0.0  # sum of O * I ** 2 over the matrices that are quantized
    cubes: float = 0.0  # sum of I ** 3 over the Hessians that are factorised
    memory: float = 0.0  # bytes that it holds at its fullest
    result: float = 0.0  # bytes that it writes

    def seconds(self, rates: Rates) -> float:
        return (
            UNIT_SECONDS
            + self.products / rates.product
            + self.passes / rates.copy
            + self.rows * rates.row
            + self.cubes * rates.matrix
        )


@dataclass(frozen=True)
class Plan:
    """What a run is expected to need."""

    device: str
    workers: int
    units: int
    seconds: float
    worker_seconds: float  # of all units together
    memory_bytes: int  # peak resident memory of the process, or of one worker process and the driver
    device_memory_bytes: int  # peak on a GPU, 0 on a CPU
    disk_bytes: int  # at its fullest, output included
    output_bytes: int
    stages: dict[str, float] = field(default_factory=dict)  # worker seconds by kind of unit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(context: Context, workers: int, rates: Rates | None = None) -> Plan:
    """Predict a run of `quantize` with this context; nothing is read but headers."""
    rates = rates or measure_rates(context)
    units = graph(context)
    works = {unit.key: work_of(context, unit) for unit in units}
    seconds = {unit.key: works[unit.key].seconds(rates) for unit in units}
    stages: dict[str, float] = {}
    for unit in units:
        stages[unit.function] = stages.get(unit.function, 0.0) + seconds[unit.key]
    total, memory, disk = simulate(units, works, seconds, workers)
    on_device = context.device.type != "cpu"
    output = sum(works[unit.key].result for unit in units if unit.keep)
    return Plan(
        device=context.device.type,
        workers=workers,
        units=len(units),
        seconds=round(total, 1),
        worker_seconds=round(sum(seconds.values()), 1),
        memory_bytes=int(process_bytes() + (memory if not on_device else memory / 2)),
        device_memory_bytes=int(memory) if on_device else 0,
        disk_bytes=int(disk),
        output_bytes=int(output),
        stages={name: round(value, 1) for name, value in stages.items()},
    )


def simulate(
    units: list[Unit], works: dict[str, Work], seconds: dict[str, float], workers: int
) -> tuple[float, float, float]:
    """(seconds, peak bytes of memory, peak bytes on disk) of a run on so many workers, as `executor.run_units` goes."""
    consumers: dict[str, set[str]] = {}
    for unit in units:
        for need in unit.needs:
            consumers.setdefault(need, set()).add(unit.key)
    kept = {unit.key for unit in units if unit.keep}
    pending = {unit.key: unit for unit in units}
    blocked = {unit.key: {need for need in unit.needs} for unit in units}
    ready = [unit.key for unit in units if not blocked[unit.key]]
    order = {unit.key: i for i, unit in enumerate(units)}
    running: list[tuple[float, str]] = []
    clock = memory = disk = peak_memory = peak_disk = 0.0
    while ready or running:
        ready.sort(key=order.__getitem__, reverse=True)
        while ready and len(running) < workers:
            key = ready.pop()
            memory += works[key].memory
            heapq.heappush(running, (clock + seconds[key], key))
        peak_memory = max(peak_memory, memory)
        clock, key = heapq.heappop(running)
        memory -= works[key].memory
        disk += works[key].result
        peak_disk = max(peak_disk, disk)
        for need in pending.pop(key).needs:
            consumers[need].discard(key)
            if not consumers[need] and need not in kept:
                disk -= works[need].result
        for consumer in consumers.get(key, ()):
            blocked[consumer].discard(key)
            if not blocked[consumer]:
                ready.append(consumer)
    return clock, peak_memory, peak_disk


# --- the work of every unit ------------------------------------------------------------------------------------------


def work_of(context: Context, unit: Unit) -> Work:
    return WORK[unit.function](_Sizes(context), unit)


class _Sizes:
    """The numbers that work is counted from."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.source, self.recipe = context.source, context.recipe
        calibration = context.recipe.calibration
        self.T = calibration.length
        self.n = min(calibration.windows, calibration.windows_per_unit) * self.T
        self.N = calibration.windows * self.T
        self.H = context.source.hidden_size
        self.V = context.source.model.get_input_embeddings().weight.shape[0]
        self.hidden = 4 * self.n * self.H  # bytes of one shard of the residual stream
        heads = getattr(context.source.config, "num_attention_heads", 1)
        self.attention = 4 * self.n * self.T * heads * getattr(context.source.config, "head_dim", self.H // heads)

    def dense(self, layer: int) -> list[tuple[int, int]]:
        """(O, I) of every linear map of a layer but its experts."""
        structure, prefix = self.source.structures[layer], self.source.layer_names[layer]
        return [
            self.source.sources[f"{prefix}.{reader}.weight"][0].shape  # type: ignore[misc]
            for site in structure.sites
            for reader in site.readers
        ]

    def dense_size(self, layer: int) -> int:
        return sum(prod(shape) for shape in self.dense(layer))

    def inner_widths(self, layer: int) -> list[tuple[int, int]]:
        """(I, all rows) of every site that is quantized."""
        structure, prefix = self.source.structures[layer], self.source.layer_names[layer]
        found = []
        for site in structure.sites:
            readers = [r for r in site.readers if self.context.scheme(layer, r) is not None]
            if readers:
                shapes = [self.source.sources[f"{prefix}.{r}.weight"][0].shape for r in readers]
                found.append((shapes[0][1], sum(shape[0] for shape in shapes)))
        return found

    def experts(self, layer: int) -> tuple[int, int, int, int]:
        """(E, k, M, matrices of H x M per expert), all 0 for a dense layer."""
        structure = self.source.structures[layer].experts
        if structure is None:
            return 0, 0, 0, 0
        config = self.source.config
        k = next((getattr(config, a) for a in ("num_experts_per_tok", "moe_topk", "top_k") if hasattr(config, a)), 1)
        return structure.num_experts, k, structure.intermediate, 3 if structure.has_gate else 2


def stored_bytes(context: Context, rows: int, columns: int, bits: int, group: int) -> int:
    """Of a quantized matrix: indices, codebooks and steps."""
    return rows * (columns * bits // 8 + groups_per_row(columns, group) * (2**bits + 2))


def _forward(s: _Sizes, layer: int, experts: bool) -> Work:
    """One layer on one shard of windows."""
    E, k, M, P = s.experts(layer)
    dense = s.dense_size(layer)
    work = 2.0 * s.n * dense + s.attention
    passes = 16 * dense + 10 * s.hidden
    if experts:
        work += 2 * s.n * k * P * s.H * M
        passes += 24 * min(E, s.n * k) * P * s.H * M / 2 + 4 * s.n * k * (4 * s.H + 6 * M)
    memory = 8 * dense + 6 * s.hidden + 4 * s.n * (2 * s.H + max((o for o, _ in s.dense(layer)), default=0)) + 8 * P * s.H * M
    return Work(work, passes, memory=memory, result=s.hidden)


def _embed(s: _Sizes, unit: Unit) -> Work:
    touched = min(2 * s.V * s.H, 4096 * s.n)
    return Work(passes=4 * s.hidden, memory=3 * s.hidden + touched, result=s.hidden)


def _teacher(s: _Sizes, unit: Unit) -> Work:
    forward = _forward(s, unit.arguments["layer"], experts=True)
    samples = 0.0
    if s.context.rotates:
        samples = 2 * s.H * min(s.recipe.rotation.samples, 2 * s.N * s.source.num_layers) / (
            s.source.num_layers * s.context.window_shards
        )
    return Work(forward.products, forward.passes, memory=forward.memory, result=s.hidden + samples)


def _rotation(s: _Sizes, unit: Unit) -> Work:
    r = s.recipe.rotation
    norms = sum(len(structure.norms) for structure in s.source.structures)
    rows = min(r.samples, norms * s.N)
    cube = float(s.H) ** 3
    step = 6.0 * min(r.batch, rows) * s.H**2 + 12 * cube
    once = 4.0 * rows * s.H**2 + 60 * cube
    return Work(
        r.steps * step + once,
        passes=40 * r.steps * min(r.batch, rows) * s.H,
        memory=2 * 2 * rows * s.H + rows * s.H + 12 * 4 * s.H**2 * 2,
        result=4 * s.H**2,
    )


def _ends(s: _Sizes, unit: Unit) -> Work:
    both = 2 * s.V * s.H
    products = 2.0 * both * s.H if s.context.rotates else 0.0
    return Work(products, passes=8 * both, memory=2 * both + both, result=2 * both)


def _enter(s: _Sizes, unit: Unit) -> Work:
    return _embed(s, unit)


def _dense(s: _Sizes, unit: Unit) -> Work:
    layer = unit.arguments["layer"]
    E, k, M, P = s.experts(layer)
    sites = s.inner_widths(layer)
    dense, shards = s.dense_size(layer), s.context.window_shards
    runs = len(sites) + (1 if E else 0)
    # both streams run up to every site; half of the layer on average
    products = runs * shards * (2.0 * s.n * dense + s.attention)
    products += sum(4.0 * s.N * I * I for I, _ in sites) + (4.0 * s.N * s.H**2 if E else 0)
    if s.context.rotates:
        products += runs * 2.0 * s.N * s.H**2 + 4.0 * dense * s.H
        proof = min(E, 4 * k) * P * s.H * M  # a few tokens through experts in the new basis
        products += 2.0 * proof * s.H
    passes = runs * shards * (16 * dense + 20 * s.hidden) + sum(12 * s.N * I for I, _ in sites)
    widest = max((I for I, _ in sites), default=s.H)
    rows = max((O for I, O in sites if I == widest), default=0)
    return Work(
        products,
        passes,
        rows=sum(O * float(I) ** 2 for I, O in sites),
        cubes=sum(float(I) ** 3 for I, _ in sites),
        memory=16 * dense + 8 * s.hidden + 8 * 8 * widest**2 + 24 * rows * widest,
        result=_packed(s, layer, experts=False) + (8 * s.H**2 if E else 0),
    )


def _route(s: _Sizes, unit: Unit) -> Work:
    forward = _forward(s, unit.arguments["layer"], experts=False)
    _, k, _, _ = s.experts(unit.arguments["layer"])
    rotate = 2.0 * s.n * s.H**2 if s.context.rotates else 0
    return Work(
        2 * forward.products + rotate, 2 * forward.passes, memory=forward.memory * 1.5, result=2 * s.hidden + 8 * s.n * k
    )


def _experts(s: _Sizes, unit: Unit) -> Work:
    layer, count = unit.arguments["layer"], unit.arguments["stop"] - unit.arguments["start"]
    E, k, M, P = s.experts(layer)
    outer, inner = (s.context.experts_scheme(layer, inner=i) for i in (False, True))
    tokens = count * s.N * k / E
    weights = P * s.H * M
    products = 4.0 * tokens * s.H**2 + 4.0 * tokens * (P - 1) * s.H * M + 4.0 * tokens * M**2
    if s.context.rotates:
        products += 2.0 * count * weights * s.H
    rows = cubes = 0.0
    if outer is not None:
        rows += count * (P - 1) * M * float(s.H) ** 2
        cubes += count * float(s.H) ** 3
    if inner is not None:
        rows += count * s.H * float(M) ** 2
        cubes += count * float(M) ** 3
    passes = 60 * count * weights + tokens * (40 * s.H + 60 * M) + count * 40 * (s.H**2 + M**2)
    moments = 4 * s.H**2
    return Work(
        products,
        passes,
        rows,
        cubes,
        memory=count * (4 * 4 * weights + 8 * moments) + 14 * moments + 8 * tokens / count * (3 * s.H + 3 * M),
        result=_packed(s, layer, experts=True) * count / E,
    )


def _layer(s: _Sizes, unit: Unit) -> Work:
    size = _packed(s, unit.arguments["layer"], experts=True) + _packed(s, unit.arguments["layer"], experts=False)
    return Work(passes=6 * size, memory=2 * size, result=size)


def _student(s: _Sizes, unit: Unit) -> Work:
    return _forward(s, unit.arguments["layer"], experts=True)


def _packed(s: _Sizes, layer: int, experts: bool) -> float:
    """Bytes of a layer's experts, or of everything else."""
    total = 0.0
    for matrix in s.layer_matrices(layer):
        if matrix.is_expert == experts:
            scheme = s.context.config.scheme(matrix.module)
            O, I = matrix.out_features, matrix.in_features
            total += 2 * O * I if scheme is None else stored_bytes(s.context, O, I, scheme.bits, scheme.group_size)
    return total


WORK: dict[str, Callable[[_Sizes, Unit], Work]] = {
    "embed": _embed,
    "teacher": _teacher,
    "rotation": _rotation,
    "ends": _ends,
    "enter": _enter,
    "dense": _dense,
    "route": _route,
    "experts": _experts,
    "layer": _layer,
    "student": _student,
}
