"""What a run will need, before it starts: memory, disk and time, from the config and the shards' headers alone.

The graph of units is walked as the executor walks it, with the work of every unit counted in floating-point operations
and bytes, and turned into seconds by rates that a few seconds of measuring give on the machine at hand. Peak memory is
that of the units that run side by side, peak disk that of the results that are alive.

Letters: N calibration tokens, n of one unit, T of one window, H hidden and M intermediate channels, E experts, k of
them for each token, V words of the vocabulary, O and I output and input channels.
"""

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from rich.table import Table

from codequant.executor import Unit, torch_threads
from codequant.packing import BITS, groups_per_row
from codequant.quantization_config import Scheme
from codequant.units import Context, graph
from codequant.units.dense import PROOF_TOKENS
from codequant.units.ends import ROWS
from codequant.units.matrices import quantize
from codequant.units.moments import Moments

PROCESS_BYTES = 520 << 20  # Python with torch, transformers, a tokenizer and the names in the source, before any work
SAMPLE_WIDTH = 2048  # of the widest matrix that is quantized to measure rates
# (Hessians, rows under each) of two matrices. A GPU takes as long for a few rows as for thousands, and units give it
# thousands.
SAMPLES = {"cpu": ((1, 16), (1, 272)), "cuda": ((16, 256), (16, 1280))}
# Bytes per second between files and a GPU, through one thread of the host: source tensors (page cache, a copy, the bus)
# and results (the bus, SHA-256, fsync). Measured on 2026-11-22 beside one H200, as in docs/LOG.md.
GPU_READ, GPU_WRITE = 2.8e9, 4e8
# Scratch memory of kernels/triton/clustering.py: bytes per value, and values at a time.
GPU_CLUSTERING = (116, 2**24)
UNIT_SECONDS = 0.005  # two synced files and the bookkeeping of a unit
CALL_SECONDS = 5e-5  # one operation on small tensors, from Python


@dataclass(frozen=True)
class Rates:
    """What one worker does."""

    product: float  # floating-point operations per second, in float32 matrix products
    copy: float  # bytes per second that elementwise passes read and write
    quantize: dict[int, tuple[float, float]]  # I: seconds per Hessian, and per row that is quantized under it
    read: float = math.inf  # bytes per second from files to a GPU; a CPU reads them as it computes
    write: float = math.inf  # of results that a GPU computes; beside a CPU's work it is nothing

    def quantizing(self, I: int, hessians: float, rows: float) -> float:
        """Seconds. Wider matrices than were measured: factorisations grow by the cube, sweeps by the square."""
        width = min((w for w in self.quantize if w >= I), default=max(self.quantize))
        per_hessian, per_row = self.quantize[width]
        return hessians * per_hessian * (I / width) ** 3 + rows * per_row * (I / width) ** 2


@dataclass(frozen=True)
class Work:
    """One unit of work."""

    products: float = 0.0  # float32 operations
    passes: float = 0.0  # bytes read and written by elementwise passes
    quantized: tuple[tuple[int, float, float], ...] = ()  # (I, Hessians, rows)
    calls: float = 0.0  # operations on tensors so small that only their number counts
    read: float = 0.0  # bytes of source, inputs and other results
    memory: float = 0.0  # bytes that it holds at its fullest
    result: float = 0.0  # bytes that it writes

    def seconds(self, rates: Rates, sharing: int = 1) -> float:
        """`sharing` workers compute on one device; each reads, writes and calls by itself."""
        own = self.calls * CALL_SECONDS + self.read / rates.read + self.result / rates.write
        shared = self.products / rates.product + self.passes / rates.copy
        shared += sum(rates.quantizing(*part) for part in self.quantized)
        return UNIT_SECONDS + own + sharing * shared


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
    works = count_work(context, units)
    on_gpu = context.device.type != "cpu"
    seconds = {key: work.seconds(rates, workers if on_gpu else 1) for key, work in works.items()}
    stages: dict[str, float] = {}
    for unit in units:
        stages[unit.function] = stages.get(unit.function, 0.0) + seconds[unit.key]
    total, memory, disk = simulate(units, works, seconds, workers)
    return Plan(
        device=context.device.type,
        workers=workers,
        units=len(units),
        seconds=round(total, 1),
        worker_seconds=round(sum(seconds.values()), 1),
        memory_bytes=int(PROCESS_BYTES + memory),
        device_memory_bytes=int(memory) if on_gpu else 0,
        disk_bytes=int(disk),
        output_bytes=int(sum(works[unit.key].result for unit in units if unit.keep)),
        stages={name: round(value, 1) for name, value in stages.items()},
    )


def disk_bytes(context: Context) -> int:
    """What a run keeps on disk at its fullest."""
    units = graph(context)
    works = count_work(context, units)
    return int(simulate(units, works, dict.fromkeys(works, 1.0), 1)[2])


def workers_that_fit(context: Context, cores: int, available: int) -> int:
    """The most workers, up to one per core, whose units fit side by side in so many bytes of memory; at least one."""
    units = graph(context)
    works = count_work(context, units)
    largest = sorted((work.memory for work in works.values()), reverse=True)
    # units of one kind run together, so the largest ones bound what is alive at a time
    fitting = (n for n in range(cores, 1, -1) if PROCESS_BYTES + sum(largest[:n]) <= available)
    return next(fitting, 1)


def count_work(context: Context, units: list[Unit]) -> dict[str, Work]:
    sizes = _Sizes(context)
    return {unit.key: WORK[unit.function](sizes, **unit.arguments) for unit in units}


def simulate(
    units: list[Unit], works: dict[str, Work], seconds: dict[str, float], workers: int
) -> tuple[float, float, float]:
    """(seconds, peak bytes of memory, peak bytes on disk) of a run on so many workers, as `executor.run_units` goes."""
    consumers: dict[str, set[str]] = {}
    for unit in units:
        for need in unit.needs:
            consumers.setdefault(need, set()).add(unit.key)
    by_key = {unit.key: unit for unit in units}
    order = {unit.key: i for i, unit in enumerate(units)}
    blocked = {unit.key: set(unit.needs) for unit in units}
    ready = [order[unit.key] for unit in units if not unit.needs]  # a heap: earlier units first
    running: list[tuple[float, str]] = []
    clock = memory = disk = peak_memory = peak_disk = 0.0
    while ready or running:
        while ready and len(running) < workers:
            key = units[heapq.heappop(ready)].key
            memory += works[key].memory
            heapq.heappush(running, (clock + seconds[key], key))
        peak_memory = max(peak_memory, memory)
        clock, key = heapq.heappop(running)
        memory -= works[key].memory
        disk += works[key].result
        peak_disk = max(peak_disk, disk)
        for need in by_key[key].needs:
            consumers[need].discard(key)
            if not consumers[need] and not by_key[need].keep:
                disk -= works[need].result
        for consumer in consumers.get(key, ()):
            blocked[consumer].discard(key)
            if not blocked[consumer]:
                heapq.heappush(ready, order[consumer])
    return clock, peak_memory, peak_disk


def as_table(plan: Plan) -> Table:
    """For people."""
    table = Table(box=None, show_header=False)
    workers = f"{plan.workers} worker{'s' * (plan.workers > 1)}, {plan.device}"
    rows = [
        (
            "time",
            f"{duration(plan.seconds)} on {workers} ({plan.units} units, {duration(plan.worker_seconds)} of work)",
        ),
        ("memory", f"{plan.memory_bytes / 2**30:.1f} GiB"),
        ("disk", f"{plan.disk_bytes / 1e9:.1f} GB at its fullest, of which {plan.output_bytes / 1e9:.1f} GB stay"),
    ]
    if plan.device_memory_bytes:
        rows.insert(2, ("GPU memory", f"{plan.device_memory_bytes / 2**30:.1f} GiB"))
    for row in (*rows, *((name, duration(seconds)) for name, seconds in plan.stages.items())):
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- the work of every unit ------------------------------------------------------------------------------------------


class _Sizes:
    """The numbers that work is counted from."""

    def __init__(self, context: Context) -> None:
        self.context, self.source, self.recipe = context, context.source, context.recipe
        calibration, config = context.recipe.calibration, context.source.config
        self.shards = context.window_shards
        self.T = calibration.length
        self.n = min(calibration.windows, calibration.windows_per_unit) * self.T
        self.N = calibration.windows * self.T
        self.H = context.source.hidden_size
        (entry,) = context.source.sources[f"{context.source.embedding_name}.weight"]
        self.V = entry.shape[0]
        self.stream = 4 * self.n * self.H  # bytes of one shard of hidden states
        head = getattr(config, "head_dim", None) or self.H // config.num_attention_heads
        self.attention = 4.0 * self.n * self.T * config.num_attention_heads * head

    @cache  # noqa: B019  lives as long as the plan
    def sites(self, layer: int) -> list[tuple[int, int, bool]]:
        """(O of all readers, I, whether it is quantized) of every tensor that linear maps of a layer read."""
        structure, prefix = self.source.structures[layer], self.source.layer_names[layer]
        found = []
        for site in structure.sites:
            shapes = [self.source.sources[f"{prefix}.{r}.weight"][0].shape for r in site.readers]
            quantized = any(self.context.scheme(layer, r) is not None for r in site.readers)
            found.append((sum(O for O, _ in shapes), shapes[0][1], quantized))
        return found

    def scratch(self, values: float) -> float:
        """Bytes beside a matrix of so many values while it is clustered."""
        per_value, limit = GPU_CLUSTERING
        return per_value * min(values, limit) if self.context.device.type != "cpu" else 0.0

    def weights(self, layer: int) -> int:
        """Of all linear maps of a layer but its experts."""
        return sum(O * I for O, I, _ in self.sites(layer))

    def experts(self, layer: int) -> tuple[int, int, int, int]:
        """(E, k, M, H x M matrices of one expert); zeros for a dense layer."""
        structure = self.source.structures[layer].experts
        if structure is None:
            return 0, 0, 0, 0
        k = getattr(self.source.config, "num_experts_per_tok", None) or 1
        return structure.num_experts, k, structure.intermediate, 3 if structure.has_gate else 2

    def packed(self, layer: int) -> tuple[float, float]:
        """Bytes of a finished layer: everything but its experts, and one expert."""
        E, _, M, P = self.experts(layer)
        scheme = self.context.config.default
        rest = sum(stored(O, I, scheme) if quantized else 2 * O * I for O, I, quantized in self.sites(layer))
        if not E:
            return rest, 0
        outer, inner = (self.context.experts_scheme(layer, inner=i) for i in (False, True))
        one = stored((P - 1) * M, self.H, outer) + stored(self.H, M, inner)
        return rest, one * (self.recipe.weights.target_bits or scheme.bits) / scheme.bits


def stored(rows: int, columns: int, scheme: Scheme | None) -> float:
    """Bytes of a matrix in the output: indices, codebooks and steps, or bfloat16."""
    if scheme is None:
        return 2 * rows * columns
    groups = groups_per_row(columns, scheme.group_size)
    return rows * (columns * scheme.bits / 8 + groups * (2**scheme.bits + 2))


def _forward(s: _Sizes, layer: int, experts: bool) -> Work:
    """One layer on one shard of windows, its experts one at a time."""
    E, k, M, P = s.experts(layer)
    weights, expert = s.weights(layer), P * s.H * M
    products = 2.0 * s.n * weights + s.attention
    passes = 24.0 * weights + 40 * s.stream
    if experts:
        products += 2.0 * s.n * k * expert
        passes += 15.0 * min(E, s.n * k) * expert + s.n * k * (20 * s.H + 30 * M)
    widest = max((O for O, *_ in s.sites(layer)), default=0)
    memory = 10 * weights + 6 * s.stream + 8 * s.n * widest + 16 * expert
    read = s.stream + 2 * weights + 2 * E * expert * experts
    return Work(products, passes, calls=25 * E * experts, read=read, memory=memory, result=s.stream)


def _embed(s: _Sizes) -> Work:
    return Work(passes=4 * s.stream, memory=4 * s.stream + min(2 * s.V * s.H, 4096 * s.n), result=s.stream)


def _teacher(s: _Sizes, layer: int) -> Work:
    forward = _forward(s, layer, experts=True)
    return replace(forward, result=s.stream + 2 * s.H * _samples(s) / s.shards / s.source.num_layers)


def _samples(s: _Sizes) -> float:
    """Cached rows that the rotation is learned on."""
    norms = sum(len(structure.norms) for structure in s.source.structures)
    return min(s.recipe.rotation.samples, norms * s.N) if s.context.rotates else 0


def _rotation(s: _Sizes) -> Work:
    r, cube = s.recipe.rotation, float(s.H) ** 3
    rows = _samples(s)
    batch = min(r.batch, rows)
    return Work(
        products=r.steps * (6 * batch * s.H**2 + 8 * cube) + 4 * rows * s.H**2 + 40 * cube,
        passes=r.steps * (60 * batch * s.H + 60 * s.H**2),
        memory=4 * rows * s.H + 80 * s.H**2,
        result=4 * s.H**2,
    )


def _ends(s: _Sizes) -> Work:
    one = 2.0 * s.V * s.H  # bytes of the embedding or the head
    products = 2 * one * s.H if s.context.rotates else 0.0
    return Work(products, 24 * one, memory=3 * one + 12 * ROWS * s.H, result=2 * one)


def _dense(s: _Sizes, layer: int) -> Work:
    E, k, M, P = s.experts(layer)
    weights = s.weights(layer)
    quantized = [(O, I) for O, I, q in s.sites(layer) if q]
    runs = len(quantized) + bool(E)  # of both streams, up to a site: half of the layer on average
    products = runs * s.shards * (2.0 * s.n * weights + 2 * s.attention)
    products += sum(4.0 * s.N * I**2 for _, I in quantized) + (4.0 * s.N * s.H**2 if E else 0.0)
    if s.context.rotates:
        products += 2.0 * runs * s.N * s.H**2 + 4.0 * weights * s.H
        products += 2.0 * min(E, PROOF_TOKENS * k) * P * s.H * M * s.H
    read = 2.0 * runs * s.shards * s.stream + 2 * min(E, PROOF_TOKENS * k) * P * s.H * M
    widest = max((I for _, I in quantized), default=s.H)
    rows = max((O for O, I in quantized if I == widest), default=0)
    return Work(
        products,
        passes=runs * s.shards * (24.0 * weights + 40 * s.stream) + sum(24.0 * s.N * I for _, I in quantized),
        quantized=tuple((I, 1, O) for O, I in quantized),
        calls=100 * runs * s.shards,
        read=read,
        memory=16 * weights + 10 * s.stream + 64 * widest**2 + 24 * rows * widest + s.scratch(rows * widest),
        result=s.packed(layer)[0] + (8 * s.H**2 if E else 0),
    )


def _route(s: _Sizes, layer: int) -> Work:
    forward, k = _forward(s, layer, experts=False), s.experts(layer)[1]
    rotating = 2.0 * s.n * s.H**2 if s.context.rotates else 0.0
    result = 2 * s.stream + 8 * s.n * k
    return Work(
        2 * forward.products + rotating,
        2 * forward.passes,
        read=2 * forward.read,
        memory=1.5 * forward.memory,
        result=result,
    )


def _experts(s: _Sizes, layer: int, start: int, stop: int) -> Work:
    E, k, M, P = s.experts(layer)
    count = stop - start
    tokens, expert = count * s.N * k / E, P * s.H * M
    outer, inner = (s.context.experts_scheme(layer, inner=i) for i in (False, True))
    products = 4.0 * tokens * (s.H**2 + (P - 1) * s.H * M + M**2)
    if s.context.rotates:
        products += 2.0 * count * expert * s.H
    return Work(
        products,
        passes=count * (60.0 * expert + 60 * (s.H**2 + M**2)) + tokens * (60 * s.H + 60 * M),
        quantized=tuple(
            (I, count, count * O) for I, O, scheme in ((s.H, (P - 1) * M, outer), (M, s.H, inner)) if scheme is not None
        ),
        calls=60 * count * s.shards,
        read=4.0 * s.shards * s.stream + 2 * count * expert,
        memory=count * (16 * expert + 32 * s.H**2)
        + 56 * s.H**2
        + 24 * tokens / count * (s.H + M)
        + s.scratch(count * expert),
        result=count * s.packed(layer)[1],
    )


def _sensitivity(s: _Sizes, layer: int) -> Work:
    """The teacher once more, and a few rows of each expert's matrices clustered at every width."""
    forward, (E, _, M, P) = _forward(s, layer, experts=True), s.experts(layer)
    rotating = 2.0 * (s.N + E * P * M) * s.H**2 if s.context.rotates else 0.0
    clustering = 24e3 * E * len(BITS) * (s.H + M)
    return Work(
        s.shards * forward.products + rotating,
        s.shards * forward.passes + clustering,
        calls=s.shards * forward.calls,
        memory=forward.memory + 8 * s.H**2,
        result=16 * len(BITS) * E,
    )


def _layer(s: _Sizes, layer: int) -> Work:
    rest, expert = s.packed(layer)
    size = rest + expert * s.experts(layer)[0]
    return Work(passes=6 * size, memory=2 * size, result=size)  # on the host


def _student(s: _Sizes, layer: int) -> Work:
    forward = _forward(s, layer, experts=True)
    rest, expert = s.packed(layer)
    read = s.stream + rest + expert * s.experts(layer)[0]
    return replace(forward, calls=2 * forward.calls, read=read)  # packed matrices come in several parts


WORK: dict[str, Callable[..., Work]] = {
    "embed": lambda s, shard: _embed(s),
    "teacher": lambda s, layer, shard: _teacher(s, layer),
    "rotation": _rotation,
    "sensitivity": _sensitivity,
    "allocation": lambda s: Work(result=2.0 * sum(e.num_experts for e in s.context.experts_by_layer.values())),
    "ends": _ends,
    "enter": lambda s, shard: _embed(s),
    "dense": _dense,
    "route": lambda s, layer, shard: _route(s, layer),
    "experts": _experts,
    "layer": _layer,
    "student": lambda s, layer, shard: _student(s, layer),
}


# --- what the machine does per second --------------------------------------------------------------------------------


def measure_rates(context: Context) -> Rates:
    """A few seconds of the run's own operations on one worker of this machine."""
    device = context.device
    with torch_threads(1):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 1024, 1024, generator=generator).to(device)
        long = torch.zeros(1 << 24, device=device)
        product = 2 * 1024**3 / _best(lambda: a @ b, device)
        copy = 2 * 4 * len(long) / _best(lambda: long.mul(2), device)
        widths = sorted({min(I, SAMPLE_WIDTH) for I in quantized_widths(context)})
        quantizing = {I: _seconds_to_quantize(context, I, generator) for I in widths}
    if device.type == "cpu":
        return Rates(product, copy, quantizing)
    return Rates(product, copy, quantizing, GPU_READ, GPU_WRITE)


def _seconds_to_quantize(context: Context, I: int, generator: torch.Generator) -> tuple[float, float]:
    """Per Hessian and per row, from two stacks of random matrices of different height."""
    x = torch.randn(2 * I, I, generator=generator).to(context.device)
    moment = (x.T @ x / len(x)).unsqueeze(0)

    def seconds(hessians: int, rows: int) -> float:
        weight = torch.randn(hessians, rows, I, generator=generator).to(context.device)
        moments = Moments(*(moment.expand(hessians, -1, -1).clone() for _ in range(2)))
        scheme = context.config.default
        return _best(lambda: quantize(context, scheme, weight, moments), context.device, repeats=3) / hessians

    samples = SAMPLES[context.device.type]
    few, many = (seconds(*sample) for sample in samples)
    (_, low), (_, high) = samples
    row = max(0.0, many - few) / (high - low)
    return max(0.0, few - low * row), row


def quantized_widths(context: Context) -> set[int]:
    """Input channels of the matrices that a run quantizes."""
    work = count_work(context, graph(context)).values()
    return {I for unit in work for I, *_ in unit.quantized}


def _best(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Least seconds of a few runs: of the thread, which other processes do not disturb, or until the GPU is done."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats):
        begin = clock()
        function()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(clock() - begin)
    return min(seconds)
