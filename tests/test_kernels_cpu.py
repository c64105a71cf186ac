"""The native CPU kernels against their readable twin, `kernels.reference`, with derived tolerances."""

import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import in_parts
from torch import Tensor
from torch.nn import functional as F

from codequant import kernels, native
from codequant.errors import InputError
from codequant.hadamard import hadamard_transform
from codequant.kernels import cpu, reference
from codequant.kernels.reference import ExpertWeights
from codequant.packing import PackedParts, PackedWeight, pack, unpack

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library was not built")

EPS = 2.0**-23
INSTRUCTION_SETS = native.instruction_sets() if native.library() is not None else []
# Rows and columns off every multiple of 16, 32 and 64; one of each; over one segment of 2048; groups of odd size.
SHAPES = [(16, 64, 1), (1, 1, 1), (33, 70, 1), (5, 15, 5), (40, 96, 3), (17, 4100, 1), (24, 2112, 33), (7, 5000, 2)]


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    native.use_instruction_set(native.instruction_set())
    torch.set_num_threads(threads)


def random_weight(*shape: int, bits: int = 4, groups: int = 1) -> PackedWeight:
    *lead, O, I = shape
    indices = torch.randint(0, 2**bits, (*lead, O, I), dtype=torch.uint8)
    codebook = torch.randint(-127, 128, (*lead, O, groups, 2**bits), dtype=torch.int8)
    return pack(indices, codebook, (torch.rand(*lead, O, groups) * 0.01).half())


def random_input(*shape: int) -> Tensor:
    """Tokens of different scale, off centre and with outliers, as activations are."""
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.3
    x[..., ::37] *= 30
    return x


def poison() -> None:
    """Leave NaN in every buffer that the kernels keep between calls."""
    weight = cpu.prepare_linear(random_weight(64, 5000))
    assert cpu.linear(torch.full((400, 5000), torch.nan), weight, None, 16).isnan().all()


def rounding(x: Tensor, weight: PackedWeight) -> Tensor:
    """What y [T, O] may be off by: the bound in the docstring of kernels/cpu.py. float64."""
    sums = weight.codebook.shape[-2] * -(-weight.group_size // 2048)
    largest = x.double().abs().amax(-1, keepdim=True)
    return (20 + sums) * EPS * largest * unpack(weight).double().abs().sum(-1)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert actual.shape == expected.shape and not actual.isnan().any()
    excess = (actual.double() - expected.double()).abs() - tolerance - 1e-30
    assert excess.max() <= 0, f"off by {excess.max():g} beyond the tolerance"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "groups"), SHAPES)
def test_restore_is_the_inverse_of_prepare(rows: int, columns: int, groups: int, bits: int) -> None:
    for lead in [(), (3,), (2, 2)]:
        weight = random_weight(*lead, rows, columns, bits=bits, groups=groups)
        restored = cpu.restore(cpu.prepare_linear(weight))
        for name in ("packed", "codebook", "step"):
            assert torch.equal(getattr(restored, name), getattr(weight, name))
        assert restored.in_features == columns


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "groups"), SHAPES)
def test_linear_equals_the_twin(rows: int, columns: int, groups: int, bits: int, isa: str) -> None:
    native.use_instruction_set(isa)
    poison()
    weight = random_weight(rows, columns, bits=bits, groups=groups)
    prepared = cpu.prepare_linear(weight)
    bias = torch.randn(rows)
    for tokens in (0, 1, 2, 5, 9, 90):
        x = random_input(max(tokens, 1), columns)[:tokens]
        for activation_bits, clip in [(4, 0.8), (8, 1.0), (16, 1.0)]:
            y = cpu.linear(x, prepared, None, activation_bits, clip)
            if tokens == 0:
                assert y.shape == (0, rows)
                continue
            expected = reference.codebook_linear(x.double(), weight, None, activation_bits, clip)
            assert_within(y, expected, rounding(x, weight))
            with_bias = cpu.linear(x, prepared, bias, activation_bits, clip)
            assert torch.equal(with_bias, y + bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_half_precision_rounds_once(dtype: torch.dtype) -> None:
    weight = random_weight(33, 70)
    x = random_input(2, 3, 70).clamp(-60, 60).to(dtype)
    for bits in (4, 8, 16):
        y = cpu.linear(x, cpu.prepare_linear(weight), None, bits)
        assert y.dtype == dtype and y.shape == (2, 3, 33)
        assert torch.equal(y, cpu.linear(x.float(), cpu.prepare_linear(weight), None, bits).to(dtype))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_converted_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    native.use_instruction_set(isa)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].reshape(-1, 2)
    weight = cpu.prepare_linear(random_weight(3, 2))
    assert torch.equal(cpu.linear(every, weight, None, 16), cpu.linear(every.float(), weight, None, 16).to(dtype))
    # The bias is all there is: numbers of every size, halfway cases of both dtypes, and what is not finite.
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int32)
    bits[::3] = bits[::3] >> 13 << 13 | 1 << 12
    bits[1::3] = bits[1::3] >> 16 << 16 | 1 << 15
    bias = torch.cat([bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf, 65519.9, 65520.0])])
    rows = len(bias)
    nothing = pack(torch.zeros(rows, 1, dtype=torch.uint8), torch.zeros(rows, 1, 4).char(), torch.ones(rows, 1).half())
    y = cpu.linear(torch.ones(1, 1, dtype=dtype), cpu.prepare_linear(nothing), bias, 16)[0]
    assert torch.equal(y.isnan(), bias.isnan())
    assert torch.equal(y[~y.isnan()], bias[~bias.isnan()].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_of_half_precision_round_once(dtype: torch.dtype) -> None:
    experts = random_experts(5, 70, 23, 37, input_bits=8, down_bits=8)
    prepared = cpu.prepare_experts(experts)
    x, (index, weights) = torch.randn(9, 70).to(dtype), random_routing(9, 3, 5)
    weights = weights.to(dtype)
    expected = cpu.experts(x.float(), index, weights.float(), prepared)
    assert expected.dtype == torch.float32
    for i in (index, index.int(), index.to(torch.int16), index.mT.contiguous().mT):
        y = cpu.experts(x, i, weights, prepared)
        assert y.dtype == dtype and torch.equal(y, expected.to(dtype))


def test_activation_levels_are_the_twins() -> None:
    """With an identity weight the output is the activation itself: one wrong level would be off by a whole step."""
    columns = 300
    indices = torch.eye(columns, dtype=torch.uint8)
    codebook = torch.tensor([0, 1, 2, 3], dtype=torch.int8).expand(columns, 1, 4)
    identity = pack(indices, codebook, torch.ones(columns, 1).half())
    prepared = cpu.prepare_linear(identity)
    x = torch.cat([random_input(500, columns), torch.full((1, columns), 0.7), torch.zeros(1, columns)])
    for bits, clip in [(4, 1.0), (8, 1.0), (8, 0.7)]:
        y = cpu.linear(x, prepared, None, bits, clip)
        expected = reference.fake_quantize(x, bits, clip)
        assert_within(y, expected, 8 * EPS * expected.abs().amax(-1, keepdim=True).double())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_results_depend_on_no_neighbour_thread_or_instruction_set(bits: int) -> None:
    weight = random_weight(200, 3000, bits=3)
    x = random_input(70, 3000)
    torch.set_num_threads(1)
    expected = cpu.linear(x, cpu.prepare_linear(weight), None, bits)
    for isa in INSTRUCTION_SETS:
        native.use_instruction_set(isa)
        prepared = cpu.prepare_linear(weight)
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.linear(x, prepared, None, bits), expected)
            assert torch.equal(cpu.linear(x[11:14], prepared, None, bits), expected[11:14])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_stays_so_and_alone(bad: float) -> None:
    weight = random_weight(20, 100)
    x = random_input(9, 100)
    prepared = cpu.prepare_linear(weight)
    for bits in (4, 8, 16):
        clean = cpu.linear(x, prepared, None, bits)
        dirty = x.clone()
        dirty[4, 97] = bad
        y = cpu.linear(dirty, prepared, None, bits)
        assert y[4].isnan().all()
        assert torch.equal(y[:4], clean[:4]) and torch.equal(y[5:], clean[5:])


def silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def random_experts(
    E: int, I: int, M: int, O: int, bits: int = 4, groups: int = 1, gate: bool = True, name: str = "silu", **fields
) -> ExpertWeights:
    act = ACTIVATIONS[name]

    def apply_gate(x: Tensor) -> Tensor:
        return act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] if gate else act(x)

    gate_up = random_weight(E, 2 * M if gate else M, I, bits=bits, groups=groups)
    return ExpertWeights(gate_up, random_weight(E, O, M, bits=bits), apply_gate, name, gate, **fields)


def random_routing(tokens: int, k: int, E: int) -> tuple[Tensor, Tensor]:
    return torch.rand(tokens, E).topk(k).indices, torch.rand(tokens, k)


def assert_experts_equal_twin(x: Tensor, index: Tensor, weights: Tensor, experts: ExpertWeights) -> None:
    """Compare in float64, with a tolerance that follows the roundings through the layer, slot by slot.

    gate and up are off by `rounding`; the activation and the product by that times the slopes (at most 1.2 for these
    activations) plus a few units in the last place. Levels of the intermediate that lie that close to a half may come
    out one step away: they may cost |W| * step each, and nothing else may.
    """
    y = cpu.experts(x, index, weights, cpu.prepare_experts(experts))
    expected = reference.codebook_experts(x.double(), index, weights.double(), experts)
    tolerance = torch.zeros_like(expected)
    gate_up, down = experts.gate_up, experts.down
    assert isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)
    for t, k in [(t, k) for t in range(len(x)) for k in range(index.shape[1]) if index[t, k] < len(gate_up.packed)]:
        e = index[t, k]
        first = gate_up.matrix(e)
        second = down.matrix(e)
        bias = None if experts.gate_up_bias is None else experts.gate_up_bias[e]
        token = x[t : t + 1].double()
        z = reference.codebook_linear(token, first, bias, experts.input_bits, experts.input_clip)
        z_off = rounding(token, first) + 2 * EPS * z.abs()
        hidden = experts.apply_gate(z)
        if experts.has_gate:
            gate, up = z.chunk(2, -1)
            gate_off, up_off = z_off.chunk(2, -1)
            hidden_off = 1.2 * gate_off * (up.abs() + up_off) + gate.abs() * up_off
        else:
            hidden_off = 1.2 * z_off
        hidden_off = hidden_off + 8 * EPS * (hidden.abs() + EPS)
        off = rounding(hidden, second) + hidden_off @ unpack(second).double().abs().T
        if experts.down_bits < 16:
            q = reference.quantize_activation(hidden, experts.down_bits, experts.down_clip)
            exact = (hidden - q.lo) / q.step.clamp_min(1e-30)
            doubt = (2 * hidden_off.amax() / q.step.clamp_min(1e-30)) + 2**experts.down_bits * 4 * EPS
            doubtful = ((exact - exact.floor() - 0.5).abs() <= doubt).double()
            off = off + (doubtful * q.step) @ unpack(second).double().abs().T
        out = reference.codebook_linear(hidden, second, None, experts.down_bits, experts.down_clip)
        tolerance[t] += (weights[t, k].double().abs() * (off + 4 * EPS * out.abs()))[0]
    assert_within(y, expected, 2 * tolerance + 8 * EPS * expected.abs())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("input_bits", "down_bits"), [(16, 16), (8, 8), (4, 16)])
def test_experts_equal_the_twin(input_bits: int, down_bits: int, bits: int, isa: str) -> None:
    native.use_instruction_set(isa)
    poison()
    experts = random_experts(5, 70, 23, 37, bits, groups=7, input_bits=input_bits, down_bits=down_bits, down_clip=0.9)
    for tokens in (1, 19):
        assert_experts_equal_twin(torch.randn(tokens, 70), *random_routing(tokens, 3, 5), experts)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate", [True, False])
def test_experts_with_biases_and_every_activation(name: str, gate: bool) -> None:
    M = 17
    biases = {"gate_up_bias": torch.randn(4, 2 * M if gate else M), "down_bias": torch.randn(4, 33)}
    experts = random_experts(4, 40, M, 33, gate=gate, name=name, input_bits=8, down_bits=16)
    x, routing = torch.randn(6, 40), random_routing(6, 2, 4)
    assert_experts_equal_twin(x, *routing, experts)
    experts = replace(experts, **biases)
    y = cpu.experts(x, *routing, cpu.prepare_experts(experts))
    torch.testing.assert_close(y, reference.codebook_experts(x, *routing, experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("width", [1, 8, 16, 24, 32, 90, 144, 768, 1024])
def test_hadamard_of_the_intermediate_equals_the_twin(width: int, isa: str) -> None:
    """Every kind of factor and several of them. Without quantization behind it, float32 roundings are all that differs:
    of the two products and the transform, each a sum of at most `width` or 40 terms, with every norm kept by H_n."""
    native.use_instruction_set(isa)
    poison()
    experts = random_experts(3, 40, width, 19, input_bits=8, down_transform=hadamard_transform)
    prepared = cpu.prepare_experts(experts)
    assert prepared.fused
    x, (index, weights) = torch.randn(7, 40), random_routing(7, 2, 3)
    y = cpu.experts(x, index, weights, prepared)
    expected = reference.codebook_experts(x.double(), index, weights.double(), experts)
    plain = replace(experts, down_transform=None)
    assert isinstance(experts.gate_up, PackedWeight) and isinstance(experts.down, PackedWeight)
    gate_up, down = unpack(experts.gate_up).double(), unpack(experts.down).double()
    largest = (1.2 * x.double().norm(dim=1).max() ** 2) * (gate_up.norm(dim=2).amax() ** 2) * width**0.5
    tolerance = 2 * (40 + 2 * width + 40) * EPS * largest * down.norm(dim=2).amax() * weights.sum(1).max()
    assert_within(y, expected, tolerance)
    assert (
        not torch.allclose(expected, reference.codebook_experts(x.double(), index, weights.double(), plain))
        or width == 1
    )
    experts = replace(experts, down_bits=8)
    prepared = cpu.prepare_experts(experts)
    torch.set_num_threads(1)
    y = cpu.experts(x, index, weights, prepared)
    expected = reference.codebook_experts(x, index, weights, experts)
    assert (y - expected).norm() <= expected.norm() / 255  # levels that round the other way are one step off, and few
    torch.set_num_threads(3)
    assert torch.equal(cpu.experts(x[2:5], index[2:5], weights[2:5], prepared), y[2:5])


def test_routing_extremes() -> None:
    experts = random_experts(6, 64, 32, 48, input_bits=8, down_bits=16)
    x, weights = torch.randn(11, 64), torch.rand(11, 2)
    prepared = cpu.prepare_experts(experts)
    all_to_one = torch.full((11, 2), 3)
    assert_experts_equal_twin(x, all_to_one, weights, experts)
    sentinel = all_to_one.clone()
    sentinel[::2] = 6  # not an expert here: expert parallelism
    assert_experts_equal_twin(x, sentinel, weights, experts)
    assert (cpu.experts(x, sentinel, weights, prepared)[::2] == 0).all()
    assert (cpu.experts(x, torch.full((11, 2), 6), weights, prepared) == 0).all()
    assert cpu.experts(x[:0], all_to_one[:0], weights[:0], prepared).shape == (0, 48)
    one = random_experts(1, 64, 32, 48, input_bits=4, down_bits=16)
    assert_experts_equal_twin(x, torch.zeros(11, 1, dtype=torch.int64), weights[:, :1], one)


def test_experts_do_not_depend_on_threads_or_neighbours() -> None:
    experts = random_experts(8, 256, 100, 256, input_bits=8, down_bits=8)
    prepared = cpu.prepare_experts(experts)
    x, (index, weights) = torch.randn(2100, 256), random_routing(2100, 4, 8)  # more than a slice of 2048 tokens
    torch.set_num_threads(1)
    expected = cpu.experts(x, index, weights, prepared)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.experts(x, index, weights, prepared), expected)
        assert torch.equal(cpu.experts(x[90:97], index[90:97], weights[90:97], prepared), expected[90:97])


def test_experts_that_are_not_fused_equal_the_twin() -> None:
    base = random_experts(5, 64, 32, 48, input_bits=8, down_bits=16)
    assert isinstance(base.gate_up, PackedWeight) and isinstance(base.down, PackedWeight)
    plain_gate_up, plain_down = unpack(base.gate_up), unpack(base.down)
    hadamard = torch.linalg.qr(torch.randn(32, 32)).Q
    variants = [
        replace(base, activation=None),
        replace(base, activation="mish"),
        replace(base, down=plain_down, down_bits=8),
        replace(base, gate_up=plain_gate_up, gate_up_bias=torch.randn(5, 64)),
        replace(base, gate_up=plain_gate_up, down=plain_down, down_bias=torch.randn(5, 48)),
        replace(base, down_transform=lambda x: x @ hadamard.to(x.dtype)),
    ]
    x, (index, weights) = torch.randn(13, 64), random_routing(13, 2, 5)
    index[3, 1] = 5
    scale = reference.codebook_experts(x, index, weights, base).abs().max()
    for experts in variants:
        y = cpu.experts(x, index, weights, cpu.prepare_experts(experts))
        expected = reference.codebook_experts(x, index, weights, experts)
        # 32 + 64 columns of float32 dot products; plain down quantizes at 8 bits, where a level may flip: one step.
        tolerance = 4 * (32 + 64) * EPS * scale
        if experts.down_bits == 8:
            tolerance = tolerance + scale * 2 / 255
        assert_within(y, expected, tolerance.double())


@pytest.mark.parametrize("gate", [True, False])
def test_restore_experts(gate: bool) -> None:
    experts = random_experts(3, 40, 17, 33, bits=3, gate=gate, input_bits=8)
    for variant in (experts, replace(experts, activation=None), replace(experts, down=torch.randn(3, 33, 17))):
        restored = cpu.restore(cpu.prepare_experts(variant))
        assert isinstance(restored, ExpertWeights)
        assert (restored.input_bits, restored.activation) == (variant.input_bits, variant.activation)
        for name in ("gate_up", "down"):
            before, after = getattr(variant, name), getattr(restored, name)
            if isinstance(before, Tensor):
                assert torch.equal(before, after)
            else:
                assert all(torch.equal(getattr(before, f), getattr(after, f)) for f in ("packed", "codebook", "step"))


@pytest.mark.parametrize("activation", ["silu", None])  # None: gate and up in one matrix, with a panel across the two
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_experts_in_parts_are_repacked_without_joining_them(
    bits: int, gate: bool, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(random_experts(3, 41, 17, 33, bits=bits, gate=gate), activation=activation)
    assert isinstance(whole.gate_up, PackedWeight) and isinstance(whole.down, PackedWeight)
    parts = replace(whole, gate_up=in_parts(whole.gate_up, 2 if gate else 1), down=in_parts(whole.down, 1))
    joined = PackedParts.joined
    small = {"codebook": joined, "step": joined}
    monkeypatch.setattr(PackedParts, "joined", lambda self, suffix: small[suffix](self, suffix))
    found, expected = cpu.prepare_experts(parts), cpu.prepare_experts(whole)
    for a, b in ((found.gate_up, expected.gate_up), (found.down, expected.down)):
        assert isinstance(a, cpu.Panels) and isinstance(b, cpu.Panels)
        assert a.shape == b.shape and a.stack == b.stack and torch.equal(a.data, b.data)


def test_the_reference_takes_experts_in_parts() -> None:
    whole = random_experts(3, 41, 17, 33, input_bits=8)
    assert isinstance(whole.gate_up, PackedWeight) and isinstance(whole.down, PackedWeight)
    parts = replace(whole, gate_up=in_parts(whole.gate_up, 2), down=in_parts(whole.down, 1))
    x, routing = torch.randn(6, 41), random_routing(6, 2, 3)
    expected = reference.experts(x, *routing, whole)
    assert torch.equal(reference.experts(x, *routing, parts), expected)
    prepared = reference.prepare_experts(parts)
    assert isinstance(prepared.gate_up, PackedWeight) and isinstance(prepared.down, PackedWeight)  # joined only once
    assert torch.equal(reference.experts(x, *routing, prepared), expected)


@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    torch.manual_seed(seed)
    bits, groups = draw(2, 4), draw(1, 5)
    rows, columns, tokens = draw(1, 70), groups * draw(1, 300), draw(1, 50)
    torch.set_num_threads(draw(1, 3))
    native.use_instruction_set(INSTRUCTION_SETS[draw(0, len(INSTRUCTION_SETS) - 1)])
    weight, x = random_weight(rows, columns, bits=bits, groups=groups), random_input(tokens, columns)
    activation_bits = (4, 8, 16)[draw(0, 2)]
    y = cpu.linear(x, cpu.prepare_linear(weight), None, activation_bits)
    assert_within(y, reference.codebook_linear(x.double(), weight, None, activation_bits), rounding(x, weight))
    E, k = draw(1, 9), draw(1, 3)
    experts = random_experts(
        E, columns, draw(1, 40), rows, bits, groups, gate=bool(draw(0, 1)), input_bits=activation_bits, down_bits=16
    )
    x = torch.randn(min(tokens, 8), columns)
    index = torch.randint(0, E + 1, (len(x), k), generator=generator)
    assert_experts_equal_twin(x, index, torch.rand(len(x), k), experts)


def test_operators_trace_and_compile() -> None:
    weight, experts = random_weight(33, 70), random_experts(4, 70, 17, 70, input_bits=8, down_bits=8)
    prepared, prepared_experts = cpu.prepare_linear(weight), cpu.prepare_experts(experts)
    x, (index, weights) = torch.randn(6, 70), random_routing(6, 2, 4)

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        hidden = cpu.experts(x, index, weights, prepared_experts)
        return cpu.linear(hidden.relu(), prepared, None, 8) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, index, weights), layer(x, index, weights))
    assert torch.equal(compiled(x[:3], index[:3], weights[:3]), layer(x[:3], index[:3], weights[:3]))
    torch.library.opcheck(
        torch.ops.codequant_cpu.linear,
        (x, None, prepared.data, prepared.shape, torch.randn(33), 8, 1.0, torch.bfloat16),
    )
    torch.library.opcheck(
        torch.ops.codequant_cpu.plain_linear, (x, index, torch.randn(4, 5, 70), torch.randn(4, 5), 8, 1.0)
    )
    torch.library.opcheck(torch.ops.codequant_cpu.experts, (x, index, weights, *prepared_experts.operands()))


def test_calls_from_many_threads_at_once() -> None:
    torch.set_num_threads(3)
    prepared, x = cpu.prepare_linear(random_weight(512, 1024)), random_input(60, 1024)
    expected = cpu.linear(x, prepared, None, 8)
    results: list[bool] = []

    def work() -> None:
        results.extend(torch.equal(cpu.linear(x, prepared, None, 8), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(results)


def test_a_forked_child_has_threads_of_its_own(tmp_path: Path) -> None:
    prepared, x = cpu.prepare_linear(random_weight(512, 1024)), random_input(60, 1024)

    def multiply() -> Tensor:  # without PyTorch's own operators, whose thread pool does not survive a fork
        y = torch.empty(60, 512)
        address = ctypes.addressof(prepared.matrices)
        native.module.linear(address, 60, 1, x.data_ptr(), 0, None, 0, None, 8, 1.0, 3, y.data_ptr(), 0)
        return y

    expected = multiply().numpy().tobytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if multiply().numpy().tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_errors_name_the_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = cpu.prepare_linear(random_weight(4, 64))
    with pytest.raises(InputError, match=r"float64 \[2, 64\]"):
        cpu.linear(torch.randn(2, 64, dtype=torch.float64), prepared)
    with pytest.raises(InputError, match=r"\[2, 63\].*64"):
        cpu.linear(torch.randn(2, 63), prepared)
    with pytest.raises(InputError, match="CODEQUANT_ISA: 'sse9'"):
        native.use_instruction_set("sse9")
    with pytest.raises(InputError, match="group_size: 65537"):
        cpu.prepare_linear(random_weight(1, 65537))


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEQUANT_BACKEND", raising=False)
    assert kernels.backend("cpu") is cpu
    assert kernels.backend("meta") is reference
    monkeypatch.setenv("CODEQUANT_BACKEND", "reference")
    assert kernels.backend("cpu") is reference
    monkeypatch.setenv("CODEQUANT_BACKEND", "fast")
    with pytest.raises(InputError, match="CODEQUANT_BACKEND: 'fast'"):
        kernels.backend("cpu")
    monkeypatch.setenv("CODEQUANT_BACKEND", "cpu")
    with pytest.raises(InputError, match="'cpu' cannot run on 'cuda'"):
        kernels.backend("cuda")
