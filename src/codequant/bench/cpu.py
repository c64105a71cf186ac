"""The feed-forward of one mixture-of-experts layer on the CPU: codebook kernels against what PyTorch offers.

All implementations of a shape run in one process, in turn, on the same tokens and the same routing, which changes from
round to round so that the experts' weights come from memory and not from the cache. Every output is checked before it
is timed. Times are of one call: processor time with one thread (what else runs on the machine does not count), elapsed
time with more. `gb_per_s` counts the weights of the experts that were called, in the form the implementation keeps.

    codequant-a8, codequant-a16 the fused kernel, 4-bit weights, by activation bits (4 cost what 8 do)
    torch-bf16                  F.linear, expert by expert
    torch-bf16-grouped_mm       F.grouped_mm over sorted tokens
    torch-bf16-prepacked        oneDNN with weights reordered at load (a second copy of them)
    torch-int4pack              the int4 kernel of torchao and gpt-fast: groups of 128, bf16 activations
    llama.cpp-FORMAT            llama.cpp's graph of the layer, where a package with ggml is installed (bench/ggml.py)
    read                        a STREAM-like read of as many bytes as codequant-a8's, the roofline of decoding

The products themselves are measured on one dense matrix and many tokens (codequant-a8-linear, codequant-a16-linear and
torch-bf16-linear), against the innermost loop alone on int8 operands in the first cache (micro-kernel), which does as
many operations.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant import native
from codequant.bench import ggml, results
from codequant.bench.shapes import Shape, parse_shapes
from codequant.executor import torch_threads
from codequant.hadamard import hadamard_transform
from codequant.kernels import cpu, reference
from codequant.kernels.reference import ExpertWeights
from codequant.packing import PackedWeight, unpack

BASELINE = "torch-bf16"
MICRO_KERNEL = "micro-kernel"
FILE_READ = "file-read"


@dataclass(frozen=True)
class Implementation:
    name: str
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, H], index [T, k], weights [T, k] -> [T, H]
    bytes_per_expert: float
    expected: Callable[[Tensor, Tensor, Tensor], Tensor]
    tolerance: float  # largest |output - expected| in L2 norm, relative to expected


# Relative L2 error of bfloat16: 2**-9 for each rounding of weights, activations, intermediate and output.
BF16 = 4 * 2.0**-9
# Of activations in llama.cpp's 8 bits per 32 channels: half a step of max / 127 each, for input and intermediate.
Q8_0 = 2 * 2.0**-7
# Float32 kernels whose intermediate is quantized alike but for a rare level that rounds the other way.
FLIPPED = 1e-3


def _silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _random_weight(experts: int, rows: int, columns: int) -> PackedWeight:
    """4 bits with bell-shaped codebooks, different in each row."""
    centroids = torch.linspace(-2.2, 2.2, 16) ** 3 / 4 + torch.linspace(-1.5, 1.5, 16)
    codebook = (centroids / centroids.max() * 120 + 6 * torch.rand(experts, rows, 1, 16)).round().clamp(-127, 127)
    return PackedWeight(
        torch.randint(0, 256, (experts, rows, -(-columns // 2)), dtype=torch.uint8),
        codebook.to(torch.int8),
        torch.full((experts, rows, 1), 2.0 / columns**0.5 / 127).half(),
        columns,
    )


def _loop(gate_up: Callable[[Tensor, int], Tensor], down: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """The feed-forward expert by expert, as models write it."""

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, slot = (index == e).nonzero(as_tuple=True)
            out = down(_silu_gate(gate_up(x[token], e)), e)
            y.index_add_(0, token, out * weights[token, slot, None].to(out.dtype))
        return y

    return forward


def _grouped_mm(gate_up: Tensor, down: Tensor) -> Callable[..., Tensor]:
    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        expert, order = index.flatten().sort()
        token = order // index.shape[1]
        ends = torch.bincount(expert, minlength=len(gate_up)).cumsum(0).to(torch.int32)
        hidden = _silu_gate(F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends))
        out = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, token, out)

    return forward


def _int4pack(weight: Tensor, group: int = 128) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """bf16 [E, O, I] -> per expert (packed, scales and zeros), and the float32 matrices these stand for."""
    packed, dequantized = [], []
    for w in weight:
        grouped = w.float().unflatten(1, (-1, group))
        scale = (grouped.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
        level = (grouped / scale).round().clamp(-8, 7)
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu((level + 8).flatten(1).to(torch.int32), 1)
        scales = scale.squeeze(-1).T
        packed.append((codes, torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()))
        dequantized.append((level * scale).flatten(1))
    return packed, dequantized


def _llama_cpp(kind: str, gate_up: Tensor, down: Tensor, experts: int) -> Implementation:
    layer = ggml.Experts(kind, gate_up, down, experts, torch.get_num_threads())
    exact = _loop(lambda x, e: F.linear(x, layer.gate_up), lambda x, e: F.linear(x, layer.down))
    return Implementation(
        f"llama.cpp-{kind}",
        layer,
        layer.bytes_per_expert,
        lambda x, index, weights: exact(x.float(), index, weights),
        BF16 if kind == "bf16" else Q8_0,
    )


def implementations(shape: Shape, tokens: int) -> list[Implementation]:
    E, H, M = shape.experts, shape.hidden, shape.intermediate
    gate_up, down = _random_weight(E, 2 * M, H), _random_weight(E, H, M)
    experts = ExpertWeights(gate_up, down, _silu_gate)
    fused = cpu.prepare_experts(experts)
    transformed = cpu.prepare_experts(replace(experts, down_transform=hadamard_transform))
    assert isinstance(fused.gate_up, cpu.Panels) and isinstance(fused.down, cpu.Panels)
    packed_bytes = (fused.gate_up.data.numel() + fused.down.data.numel()) / E
    rows = []
    for name, prepared, bits in (("a8", fused, 8), ("a8-hadamard", transformed, 8), ("a16", fused, 16)):
        quantized = replace(prepared, weights=replace(prepared.weights, input_bits=bits, down_bits=bits))
        whole = replace(quantized.weights, gate_up=gate_up, down=down)

        def expected(x: Tensor, index: Tensor, weights: Tensor, whole: ExpertWeights = whole) -> Tensor:
            return reference.codebook_experts(x, index, weights, whole)

        def forward(x: Tensor, index: Tensor, weights: Tensor, prepared: cpu.PreparedExperts = quantized) -> Tensor:
            return cpu.experts(x, index, weights, prepared)

        rows.append(Implementation(f"codequant-{name}", forward, packed_bytes, expected, BF16 + FLIPPED))
    exact = rows[-1].expected
    first = torch.empty(E, 2 * M, H, dtype=torch.bfloat16)
    second = torch.empty(E, H, M, dtype=torch.bfloat16)
    for e in range(E):  # one at a time: unpacking takes 16 times the memory
        for target, w in ((first, gate_up), (second, down)):
            target[e] = unpack(w.matrix(e))
    size = 2.0 * (first[0].numel() + second[0].numel())
    linear = _loop(lambda x, e: F.linear(x, first[e]), lambda x, e: F.linear(x, second[e]))
    rows.append(Implementation(BASELINE, linear, size, exact, BF16))
    rows.append(Implementation("torch-bf16-grouped_mm", _grouped_mm(first, second), size, exact, BF16))
    if torch.backends.mkldnn.is_available():
        typical = max(1, tokens * shape.top_k // E)  # rows of one call, for which oneDNN picks the order
        reorder, pointwise = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        first_packed, second_packed = ([reorder(w, typical) for w in stack] for stack in (first, second))
        prepacked = _loop(
            lambda x, e: pointwise(x, first_packed[e], None, "none", [], ""),
            lambda x, e: pointwise(x, second_packed[e], None, "none", [], ""),
        )
        rows.append(Implementation("torch-bf16-prepacked", prepacked, size, exact, BF16))
    if H % 128 == 0 and M % 128 == 0:
        (first_int4, first_exact), (second_int4, second_exact) = _int4pack(first), _int4pack(second)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        int4 = _loop(
            lambda x, e: multiply(x, first_int4[e][0], 128, first_int4[e][1]),
            lambda x, e: multiply(x, second_int4[e][0], 128, second_int4[e][1]),
        )
        int4_exact = _loop(
            lambda x, e: F.linear(x.float(), first_exact[e]),
            lambda x, e: F.linear(x, second_exact[e]).to(torch.bfloat16),
        )
        size = (first[0].numel() + second[0].numel()) * (0.5 + 4 / 128)
        rows.append(Implementation("torch-int4pack", int4, size, int4_exact, BF16))
    if ggml.library() is not None and H % 32 == 0 and M % 32 == 0:
        rows += [_llama_cpp(kind, first[0], second[0], E) for kind in ggml.TYPES]
    return rows


def _check(implementation: Implementation, x: Tensor, index: Tensor, weights: Tensor) -> None:
    y, expected = implementation.forward(x, index, weights), implementation.expected(x, index, weights)
    error = float((y.float() - expected.float()).norm() / expected.float().norm())
    if not error <= implementation.tolerance:
        raise RuntimeError(
            f"{implementation.name}: relative error {error:.3g}, expected at most {implementation.tolerance:.3g}"
        )


def run(
    shapes: dict[str, Shape], tokens: list[int], threads: int = 1, seconds: float = 2.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of measurements. `seconds`: how long each implementation is timed per shape and number of tokens, at least
    five calls. Needs memory for the bf16 weights of one layer three times. Raises RuntimeError on a wrong output."""
    native.instruction_set()
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.manual_seed(seed)
    with torch_threads(threads):
        return [
            row for name, shape in shapes.items() for T in tokens for row in _measure(name, shape, T, seconds, clock)
        ]


def _measure(name: str, shape: Shape, tokens: int, seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    candidates = implementations(shape, tokens)
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    random_routing = lambda: (  # noqa: E731
        torch.rand(tokens, shape.experts).topk(shape.top_k).indices,
        torch.rand(tokens, shape.top_k),
    )
    few = slice(0, min(tokens, 4))
    index, weights = random_routing()
    for candidate in candidates:
        _check(candidate, x[few], index[few], weights[few])
    memory = torch.empty(1 << 29, dtype=torch.uint8)
    library = native.library()
    assert library is not None
    library.codequant_advise_huge_pages(memory.data_ptr(), memory.numel())
    memory.fill_(1)
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    rates: dict[str, list[float]] = {name: [] for name in (*times, "read")}
    reads: list[float] = []
    offset, rounds = 0, 0
    while rounds < 5 or max(sum(t) for t in times.values()) < seconds:
        index, weights = random_routing()
        active = len(index.unique())
        for i, candidate in enumerate(candidates):
            shifted = (index + i * shape.top_k) % shape.experts  # some share weights: let them not warm each other's
            start = clock()
            candidate.forward(x, shifted, weights)
            times[candidate.name].append(clock() - start)
            rates[candidate.name].append(active * candidate.bytes_per_expert / times[candidate.name][-1] / 1e9)
        size = min(int(active * candidates[0].bytes_per_expert), memory.numel()) // 64 * 64
        offset = offset + size if offset + 2 * size <= memory.numel() else 0
        start = clock()
        library.codequant_read(memory.data_ptr() + offset, size, torch.get_num_threads())
        reads.append(clock() - start)
        rates["read"].append(size / reads[-1] / 1e9)
        rounds += 1
    times["read"] = reads
    summary = {key: results.percentiles(value) for key, value in times.items()}
    read = torch.tensor(rates["read"]).median().item()
    return [
        {
            "implementation": key,
            "shape": name,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            **summary[key],
            "gb_per_s": round(torch.tensor(rates[key]).median().item(), 2),
            "share_of_read": round(torch.tensor(rates[key]).median().item() / read, 3),
            **ratio(summary[key], BASELINE, summary[BASELINE]),
            "calls": rounds,
            **({"isa": ggml.instruction_set()} if key.startswith("llama.cpp") else {}),
        }
        for key in summary
    ]


def product_rows(seconds: float, tokens: int = 512, size: int = 2048) -> list[dict[str, Any]]:
    """A matrix [size, size] times many bfloat16 tokens on one thread, and the micro-kernel."""
    library = native.library()
    assert library is not None
    native.instruction_set()
    weight = _random_weight(1, size, size)
    prepared = cpu.prepare_linear(weight.matrix(0))
    x, plain = torch.randn(tokens, size).bfloat16(), torch.randn(size, size).bfloat16()
    operations, repeats = 2 * tokens * size * size, 1000
    products: dict[str, Callable[[], object]] = {
        "codequant-a8-linear": lambda: cpu.linear(x, prepared, None, 8),
        "codequant-a16-linear": lambda: cpu.linear(x, prepared, None, 16),
        "torch-bf16-linear": lambda: F.linear(x, plain),
    }
    times: dict[str, list[float]] = {name: [] for name in (*products, MICRO_KERNEL)}
    with torch_threads(1):
        while len(times[MICRO_KERNEL]) < 5 or sum(map(sum, times.values())) < 3 * seconds:
            for name, product in products.items():
                start = time.thread_time()
                product()
                times[name].append(time.thread_time() - start)
            start = time.thread_time()
            done = library.codequant_micro_kernel(repeats)
            times[MICRO_KERNEL].append((time.thread_time() - start) * operations / done)
    summary = {name: results.percentiles(values) for name, values in times.items()}
    return [
        {
            "implementation": name,
            "shape": f"{size}x{size}",
            "tokens": tokens,
            "threads": 1,
            **summary[name],
            "tera_ops_per_s": round(operations / summary[name]["median_us"] / 1e6, 2),
            **ratio(summary[name], MICRO_KERNEL, summary[MICRO_KERNEL]),
        }
        for name in times
    ]


def ratio(own: dict[str, float], name: str, baseline: dict[str, float]) -> dict[str, Any]:
    """How many times faster the median is than a baseline's."""
    return {"ratio_to": name, "ratio": round(baseline["median_us"] / own["median_us"], 2)}


def forget(files: list[Path]) -> None:
    """Have the system drop what it keeps of files in memory."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """Fill so many bytes and free them: what the host of a virtual machine has taken back comes again page by page,
    which would take longer than the loading that needs it."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def load_rows(model: str, threads: int) -> list[dict[str, Any]]:
    """Loading a quantized folder and repacking it for the kernels, against reading its shards, both from the disk."""
    from transformers import AutoModelForCausalLM

    from codequant.runtime.modules import CodebookModule

    files = sorted(Path(model).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    times: dict[str, list[float]] = {"codequant": [], FILE_READ: []}
    for _ in range(3):
        forget(files)
        start = time.perf_counter()
        for file in files:
            file.read_bytes()
        times[FILE_READ].append(time.perf_counter() - start)
        touch_memory(2 * size)  # the panels, and the files in the cache
        forget(files)
        start = time.perf_counter()
        with torch_threads(threads):
            for module in AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).modules():
                if isinstance(module, CodebookModule):
                    module.prepared()
        times["codequant"].append(time.perf_counter() - start)
    summary = {name: results.percentiles(values) for name, values in times.items()}
    return [
        {
            "implementation": name,
            "shape": f"{Path(model).name} loading",
            "tokens": 0,
            "threads": threads,
            **summary[name],
            "gb_per_s": round(size / summary[name]["median_us"] / 1e3, 2),
            **ratio(summary[name], FILE_READ, summary[FILE_READ]),
        }
        for name in times
    ]


def run_model(
    model: str, source: str, threads: int, prompt_tokens: int = 128, new_tokens: int = 32
) -> list[dict[str, Any]]:
    """Tokens per second of a quantized folder and of its source in bf16, prompt and decoding, in one process."""
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {
        "codequant": AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        BASELINE: AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
    }
    vocabulary = models[BASELINE].config.vocab_size
    times: dict[tuple[str, str], list[float]] = {(n, phase): [] for n in models for phase in ("prompt", "decode")}
    with torch_threads(threads):
        for _ in range(5):
            prompt = torch.randint(vocabulary, (1, prompt_tokens))
            for name, one in models.items():
                start = time.perf_counter()
                one.generate(prompt, max_new_tokens=1, do_sample=False)
                first = time.perf_counter() - start
                start = time.perf_counter()
                one.generate(prompt, max_new_tokens=1 + new_tokens, min_new_tokens=1 + new_tokens, do_sample=False)
                times[name, "prompt"].append(first / prompt_tokens)
                times[name, "decode"].append((time.perf_counter() - start - first) / new_tokens)
    summary = {key: results.percentiles(value) for key, value in times.items()}
    return [
        {
            "implementation": name,
            "shape": f"{Path(model).name} {phase}, per token",
            "tokens": prompt_tokens if phase == "prompt" else 1,
            "threads": threads,
            **summary[name, phase],
            "tokens_per_s": round(1e6 / summary[name, phase]["median_us"], 1),
            **ratio(summary[name, phase], BASELINE, summary[BASELINE, phase]),
        }
        for name, phase in times
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """For the screen."""
    width = max(len(r["shape"]) for r in rows)
    rates = {"tokens_per_s": "tokens/s", "gb_per_s": "GB/s", "tera_ops_per_s": "T op/s"}
    lines = [
        f"{'implementation':22} {'shape':{width}} {'T':>5} {'thr':>3} {'median us':>11} {'p10':>10} {'p90':>10} "
        f"{'rate':>17} {'ratio':>6}"
    ]
    for r in rows:
        rate = next(key for key in rates if key in r)
        lines.append(
            f"{r['implementation']:22} {r['shape']:{width}} {r['tokens']:5} {r['threads']:3} {r['median_us']:11.1f} "
            f"{r['p10_us']:10.1f} {r['p90_us']:10.1f} {r[rate]:8} {rates[rate]:8} {r['ratio']:5.2f}x"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="codequant bench cpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", default="qwen3-30b", help="comma-separated names or HIDDENxINTERMEDIATExEXPERTSxTOP_K"
    )
    parser.add_argument("--tokens", default="1,8,32,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--model", nargs=2, metavar=("DIR", "SOURCE"), help="compare whole models instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="CSV file to append to")
    a = parser.parse_args(arguments)
    if a.model:
        rows = run_model(a.model[0], a.model[1], a.threads) + load_rows(a.model[0], a.threads)
    else:
        rows = run(parse_shapes(a.shape), [int(t) for t in a.tokens.split(",")], a.threads, a.seconds)
        rows += product_rows(a.seconds)
    results.append("cpu", rows, f"{results.cpu_name()}, cpu", native.instruction_set(), a.results)
    if a.json:
        a.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
