"""`codequant bench gpu`: the experts' feed-forward on a GPU, against bfloat16, in one run.

Every implementation computes the same function (its weights are the codebook weights, dequantized), and its results are
checked against the float32 twin first, token by token. Times are of CUDA-graph replays, the implementations in turns,
because a machine's state changes from one second to the next. A GPU at its power limit takes a while to find the clock
that an implementation's power allows: the first part of a turn, at the clock of whoever came before, does not count. A
graph holds several calls with different tokens and routings, so that weights come from memory and not from the last
call's cache.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from codequant.bench import results, triton_bf16
from codequant.bench.shapes import SHAPES, Shape, parse_shapes
from codequant.errors import InputError
from codequant.evaluation import relative_errors
from codequant.kernels import reference
from codequant.kernels import triton as backend
from codequant.kernels.reference import ExpertWeights
from codequant.kernels.triton import TritonExperts
from codequant.kernels.triton.dispatch import generation
from codequant.packing import PackedWeight, unpack
from codequant.store import write_atomically

TOKENS = (1, 8, 32, 128, 1024, 4096)
LINEAR = {"4096x2048": (4096, 2048), "8192x2048": (8192, 2048)}  # output x input channels
LINEAR_TOKENS = (1, 8, 32)
MAX_ERROR = 0.01  # relative, of a token's bf16 result against float32
MAX_REQUANTIZED = 4  # where a token's 8-bit levels are others: times what quantization changes; measured 1.4 to 2.4
TURNS, SETTLE, TURN = 4, 0.2, 0.04  # of every implementation; seconds that do not count, and that do


@dataclass(frozen=True)
class Call:
    x: Tensor  # bf16 [T, I]
    index: Tensor  # int64 [T, k]
    weights: Tensor  # float32 [T, k]


def random_packed(E: int, O: int, I: int) -> PackedWeight:
    """Gaussian-like codebooks, uniformly random indices."""
    packed = torch.randint(0, 256, (E, O, I // 2), dtype=torch.uint8, device="cuda")
    codebook = (torch.randn(E, O, 1, 16, device="cuda") * 45).round().clamp(-127, 127).to(torch.int8).sort(-1).values
    step = ((torch.rand(E, O, 1, device="cuda") + 0.5) / 45 / I**0.5).half()
    return PackedWeight(packed, codebook, step, I)


def random_call(shape: Shape, tokens: int) -> Call:
    index = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k, dim=1).indices
    weights = torch.rand(tokens, shape.top_k, device="cuda")
    return Call(
        torch.randn(tokens, shape.hidden, device="cuda").bfloat16(), index, weights / weights.sum(1, keepdim=True)
    )


def dequantized(weight: PackedWeight) -> Tensor:
    """bf16 [E, O, I], one matrix at a time."""
    out = torch.empty(*weight.packed.shape[:2], weight.in_features, dtype=torch.bfloat16, device="cuda")
    for e, target in enumerate(out):
        target.copy_(unpack(weight.matrix(e)))
    return out


def ours(prepared: TritonExperts) -> Callable[[Call], Tensor]:
    return lambda call: backend.experts(call.x, call.index, call.weights, prepared)


def exactly(function: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
    """The same with 16-bit activations as they are."""

    def run(call: Call) -> Tensor:
        before = dict(os.environ)
        os.environ["CODEQUANT_A16"] = "exact"
        try:
            return function(call)
        finally:
            os.environ.clear()
            os.environ.update(before)

    return run


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiles, and creates handles, outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, calls: int) -> list[float]:
    """A turn: microseconds per call, one number per replay after SETTLE."""
    times: list[float] = []
    settled = 0.0  # milliseconds
    while len(times) < 3 or (sum(times) * calls < TURN * 1e6 and len(times) < 50):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        elapsed = start.elapsed_time(stop)
        if settled < SETTLE * 1e3:
            settled += elapsed
        else:
            times.append(elapsed * 1e3 / calls)
    return times


def times_in_turns(graphs: dict[str, torch.cuda.CUDAGraph], calls: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {label: [] for label in graphs}
    for _ in range(TURNS):
        for label, graph in graphs.items():
            times[label] += replay_times(graph, calls)
    return times


def transformers_experts(shape: Shape, gate_up: Tensor, down: Tensor) -> Callable[[Call], Tensor]:
    """What transformers runs by default on a GPU."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    module: Any = SimpleNamespace(
        num_experts=shape.experts, gate_up_proj=gate_up, down_proj=down, has_gate=True, has_bias=False,
        is_transposed=False, is_concatenated=True, _is_expert_parallel=False,
        _apply_gate=lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    )  # fmt: skip
    return lambda call: grouped_mm_experts_forward(module, call.x, call.index, call.weights.to(call.x.dtype))


def grouped_mm_alone(shape: Shape, calls: Sequence[Call], gate_up: Tensor, down: Tensor) -> Callable[[], None]:
    """Only the two matrix products, on rows that are in expert order already."""
    prepared = []
    for call in calls:
        order = call.index.flatten().argsort(stable=True)
        ends = torch.bincount(call.index.flatten(), minlength=shape.experts).cumsum(0).int()
        x = call.x[order // shape.top_k]
        prepared.append((x, torch.randn(len(x), shape.intermediate, device="cuda").bfloat16(), ends))

    def run() -> None:
        for x, hidden, ends in prepared:
            torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
            torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)

    return run


def measured_ceilings() -> tuple[float, float]:
    """(bytes/s of reading a large tensor, bf16 FLOP/s of a large product) of this GPU."""
    a = torch.randn(2**30, device="cuda")
    read = statistics.median(replay_times(captured(a.sum), 1))
    m = torch.randn(8192, 8192, device="cuda").bfloat16()
    product = statistics.median(replay_times(captured(lambda: m @ m), 1))
    return 4 * a.numel() / read * 1e6, 2 * 8192**3 / product * 1e6


def run(shapes: dict[str, Shape], tokens: Sequence[int], seed: int = 0) -> Iterator[list[dict[str, Any]]]:
    """One row per implementation, for a shape and a number of tokens at a time; experts first, then single matrices."""
    torch.manual_seed(seed)
    ceilings = measured_ceilings()
    for name, shape in shapes.items():
        layer = random_layer(shape)
        for T in tokens:
            yield _run_experts(name, layer, T, ceilings)
        del layer
        torch.cuda.empty_cache()
    for name, (O, I) in LINEAR.items():
        yield _run_linear(name, O, I, ceilings)


def _row(
    label: str, shape: str, tokens: int, times: list[float], bytes_read: float, work: float, best: float,
    error: float, ceilings: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
    times = sorted(times)
    median = statistics.median(times)
    bandwidth, flops = ceilings
    row = {
        "implementation": label, "shape": shape, "tokens": tokens, "threads": "", "median_us": round(median, 2),
        "p10_us": round(times[len(times) // 10], 2), "p90_us": round(times[len(times) * 9 // 10], 2),
        "gb_per_s": round(bytes_read / median / 1e3, 1),
        "bandwidth_share": round(bytes_read / median * 1e6 / bandwidth, 4),
        "compute_share": round(work / median * 1e6 / flops, 4), "ratio_to": "best bf16",
        "ratio": round(best / median, 3), "relative_error": error, "device": torch.cuda.get_device_name(),
        "isa": "sm{}{}".format(*torch.cuda.get_device_capability()), "torch": torch.__version__,
    }  # fmt: skip
    print(
        f"{shape:17} T={tokens:<5} {label:17} {median:9.1f} us  {row['gb_per_s']:7.0f} GB/s  "
        f"{best / median:5.2f}x best bf16",
        flush=True,
    )
    return row


def relative_error(what: str, got: Tensor, expected: Tensor, unquantized: Tensor) -> float:
    """Of results [tokens, O]. Raises if it is too large for a token, or for half of them.

    A token's 8-bit levels hang on its largest intermediate. Where kernel and twin round that to different neighbours in
    bf16, as in one of about a thousand pairs, they get all other levels: the result is as good, but another one. It
    then may differ by a multiple of what quantization itself changes.
    """
    error = relative_errors(got, expected, None)
    most = (MAX_REQUANTIZED * relative_errors(unquantized, expected, None)).clamp_min(MAX_ERROR)
    typical, within = float(error.median()), error <= most  # neither holds for NaN
    if not (typical < MAX_ERROR and within.all()):
        worst = float((error / most).max())
        raise RuntimeError(
            f"{what}: median relative error of a token {typical:.3g}, expected < {MAX_ERROR}; "
            f"{int((~within).sum())} of {len(within)} tokens past their limit, by up to {worst:.3g} times"
        )
    return float((got - expected).norm() / expected.norm())


def checked(
    what: str, function: Callable[[Call], Tensor], calls: Sequence[Call], expected: Tensor, unquantized: Tensor
) -> tuple[torch.cuda.CUDAGraph, float]:
    """The graph of all calls, whose results are expected one after the other, and their relative error."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    got = torch.cat([function(call).float() for call in calls])
    torch.use_deterministic_algorithms(False)
    error = relative_error(what, got, expected, unquantized)
    return captured(lambda: [function(call) for call in calls]), error


@dataclass(frozen=True)
class Layer:
    """The same experts for every implementation."""

    shape: Shape
    experts: ExpertWeights  # for the twin: 8-bit activations
    a8: TritonExperts
    a16: TritonExperts
    gate_up: Tensor  # bf16 [E, 2M, I]
    down: Tensor  # bf16 [E, I, M]


def random_layer(shape: Shape) -> Layer:
    E, M, I = shape.experts, shape.intermediate, shape.hidden
    gate_up, down = random_packed(E, 2 * M, I), random_packed(E, I, M)
    # The twin with the kernels' bf16 intermediate: else 8-bit levels near ties dominate the comparison.
    experts = ExpertWeights(
        gate_up, down, lambda h: F.silu(h[:, :M]) * h[:, M:], input_bits=8, down_bits=8,
        down_transform=lambda h: h.bfloat16().float(),
    )  # fmt: skip
    a8 = backend.prepare_experts(replace(experts, down_transform=None))
    assert isinstance(a8, TritonExperts)
    a16 = replace(a8, rest=replace(a8.rest, input_bits=16, down_bits=16))
    return Layer(shape, experts, a8, a16, dequantized(gate_up), dequantized(down))


def best_triton_bf16(
    what: str, layer: Layer, calls: Sequence[Call], expected: Tensor
) -> tuple[torch.cuda.CUDAGraph, float]:
    """The fastest of the yardstick's configurations in one turn of each."""
    T, k = calls[0].index.shape
    pdl = generation(layer.down.device).pdl(T * k)

    def each() -> Iterator[tuple[torch.cuda.CUDAGraph, float]]:
        for config in triton_bf16.candidates(T, T * k, layer.shape.experts):

            def one(call: Call, config: triton_bf16.Config = config) -> Tensor:
                return triton_bf16.experts(call.x, call.index, call.weights, layer.gate_up, layer.down, config, pdl)

            with suppress(OutOfResources):  # a block size may be too large for this GPU's shared memory
                yield checked(what, one, calls, expected, expected)

    # One after the other: a graph holds the memory of its intermediate results.
    return min(each(), key=lambda result: statistics.median(replay_times(result[0], len(calls))))


def _run_experts(name: str, layer: Layer, T: int, ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    shape = layer.shape
    # Enough different routings to read every expert once where a call reads a few; two at least.
    calls = [random_call(shape, T) for _ in range(max(2, min(16, 2 * shape.experts // (T * shape.top_k))))]
    unquantized = replace(layer.experts, input_bits=16, down_bits=16)
    exact_a8, exact = (
        torch.cat([reference.codebook_experts(c.x.float(), c.index, c.weights, experts) for c in calls])
        for experts in (layer.experts, unquantized)
    )
    what = f"{name}, {T} tokens"

    a8, a16 = ours(layer.a8), ours(layer.a16)
    alone = grouped_mm_alone(shape, calls, layer.gate_up, layer.down)  # owns what its graph reads
    ready = {
        "codequant-a8": checked(f"codequant-a8, {what}", a8, calls, exact_a8, exact),
        "codequant-a16": checked(f"codequant-a16, {what}", a16, calls, exact, exact),
        "codequant-a16-exact": checked(f"codequant-a16-exact, {what}", exactly(a16), calls, exact, exact),
        "transformers": checked(
            f"transformers, {what}", transformers_experts(shape, layer.gate_up, layer.down), calls, exact, exact
        ),
        "triton-bf16": best_triton_bf16(f"triton-bf16, {what}", layer, calls, exact),
        "torch-grouped_mm": (captured(alone), float("nan")),
    }
    measured = times_in_turns({label: graph for label, (graph, _) in ready.items()}, len(calls))
    hit = statistics.mean(len(c.index.unique()) for c in calls)
    weights_per_expert = 3 * shape.intermediate * shape.hidden
    work = 2 * T * shape.top_k * weights_per_expert
    best = min(statistics.median(times) for k, times in measured.items() if not k.startswith("codequant"))
    rows = []
    for label, times in measured.items():
        bytes_read = hit * weights_per_expert * (0.5 if label.startswith("codequant") else 2)
        rows.append(_row(label, name, T, times, bytes_read, work, best, ready[label][1], ceilings))
    return rows


def _run_linear(name: str, O: int, I: int, ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    """A single matrix, eight copies in turn; tinygemm's 4-bit product (group size 128, its own weights) beside it."""
    packed = [random_packed(1, O, I) for _ in range(8)]
    prepared = [backend.prepare_linear(p.matrix(0)) for p in packed]
    dense = [dequantized(p)[0] for p in packed]
    scales = torch.ones(I // 128, O, 2, dtype=torch.bfloat16, device="cuda")
    tiny = [torch.ops.aten._convert_weight_to_int4pack(p.packed[0], 8) for p in packed]
    products: dict[str, Callable[[Tensor, int], Tensor]] = {
        "codequant-a8": lambda x, i: backend.linear(x, prepared[i], None, 8),
        "codequant-a16": lambda x, i: backend.linear(x, prepared[i]),
        "torch-bf16": lambda x, i: F.linear(x, dense[i]),
        "torch-int4pack": lambda x, i: torch.ops.aten._weight_int4pack_mm(x, tiny[i], 128, scales),
    }
    rows = []
    for T in LINEAR_TOKENS:
        x = torch.randn(T, I, device="cuda").bfloat16()
        exact_a8, exact = (reference.codebook_linear(x.float(), packed[0].matrix(0), None, bits) for bits in (8, 16))
        expected = {"codequant-a8": exact_a8, "codequant-a16": exact, "torch-bf16": exact}
        graphs, error = {}, dict.fromkeys(products, float("nan"))
        for label, product in products.items():
            if label in expected:
                what, y = f"{label}, {name}, {T} tokens", product(x, 0).float()
                error[label] = relative_error(what, y, expected[label], expected[label])

            def turn(x: Tensor = x, product: Callable[[Tensor, int], Tensor] = product) -> None:
                for i in range(8):
                    product(x, i)

            graphs[label] = captured(turn)
        times = times_in_turns(graphs, 8)
        best = statistics.median(times["torch-bf16"])
        for label in products:
            bytes_read = O * I * (2 if label == "torch-bf16" else 0.5)
            rows.append(_row(label, name, T, times[label], bytes_read, 2 * T * O * I, best, error[label], ceilings))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="codequant bench gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--shape", default=",".join(SHAPES), help="comma-separated names or HIDDENxINTERMEDIATExEXPERTSxTOP_K"
    )
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=list(TOKENS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="CSV file to append to")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("bench gpu: no CUDA device, expected one")
    rows: list[dict[str, Any]] = []
    # Minutes in all: what is measured is kept at once.
    for measured in run(parse_shapes(options.shape), options.tokens):
        rows += measured
        results.append("gpu", measured, torch.cuda.get_device_name(), path=options.results)
        if options.json:
            write_atomically(options.json, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
