"""The Triton kernels against their twins in float64: on the CPU in Triton's interpreter, and the same tests on a GPU
(`pytest -m gpu`).

Products of 4- and 8-bit activations are exact in integers, so results differ from the twin's by the rounding of a few
float32 operations, each at most eps times the sum of the terms' magnitudes; every further codebook group adds one. A16
adds the fixed-point error, at most max |x| / 65024 per input element, or where it is exact an addition in float32 for
every 16 columns, which tensor cores add up at a time.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import in_parts
from torch import Tensor
from torch.nn import functional as F

from codequant.errors import InputError
from codequant.kernels import reference
from codequant.kernels.reference import ExpertWeights
from codequant.packing import SUFFIXES, PackedWeight, groups_per_row, pack, unpack, unpack_indices

pytest.importorskip("triton", reason="needs triton: pip install triton==3.6.0 (Linux)")

import triton
import triton.language as tl

from codequant.kernels import triton as backend
from codequant.kernels.triton import dispatch, ops, routing
from codequant.kernels.triton.activation import Activations, Form, bounded_step, quantize
from codequant.kernels.triton.dense import dequantize
from codequant.kernels.triton.dispatch import Tile
from codequant.kernels.triton.launch import Launch
from codequant.kernels.triton.layout import ENTRIES, paired_entries

pytestmark = pytest.mark.usefixtures("poisoned_gpu_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import ptx_interpreter

    ptx_interpreter.install()

EPS = torch.finfo(torch.float32).eps


def random_weight(shape: tuple[int, ...], bits: int, group_size: int, generator: torch.Generator) -> PackedWeight:
    *lead, O, I = shape
    G, K = groups_per_row(I, group_size), 2**bits
    indices = torch.randint(K, (*lead, O, I), generator=generator, dtype=torch.uint8)
    codebook = torch.randint(-127, 128, (*lead, O, G, K), generator=generator, dtype=torch.int8)
    step = (torch.rand(*lead, O, G, generator=generator) + 0.1) / 127 / I**0.5
    return pack(indices, codebook, step.half())


def to(weight: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(
        weight.packed.to(device), weight.codebook.to(device), weight.step.to(device), weight.in_features
    )


def linear_tolerance(x: Tensor, weight: PackedWeight, bits: int) -> Tensor:
    """Largest |error| of each output [T, O] in float32; see the top of this file."""
    x, w = x.double(), unpack(weight).double()
    G, sums = weight.codebook.shape[-2], weight.in_features / 16
    magnitude = x.abs() @ w.abs().T
    if bits == 16 and dispatch.exact_a16():
        return (8 + G + sums) * EPS * magnitude
    if bits == 16:
        return x.abs().amax(-1, keepdim=True) / 65024 * w.abs().sum(-1) + (8 + G) * EPS * magnitude
    span = x.abs().amax(-1, keepdim=True) * 2  # the zero point and the levels reach as far as this
    return (8 + G) * EPS * span * w.abs().sum(-1)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    error = (actual.double().cpu() - expected.double()).abs()
    assert error.isfinite().all()
    assert (error <= tolerance).all(), f"{(error / tolerance).max():.3g} times the tolerance"


# ---------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape, group_size", [((3, 50), -1), ((5, 96), 32), ((2, 3, 7, 128), 64), ((1, 1), -1)])
def test_restore_gives_back_what_was_prepared(bits: int, shape: tuple[int, ...], group_size: int) -> None:
    if len(shape) == 4:
        shape = shape[1:]
    weight = random_weight(shape, bits, group_size, torch.Generator().manual_seed(0))
    restored = backend.restore(backend.prepare_linear(weight))
    assert restored.in_features == weight.in_features
    for name in ("packed", "codebook", "step"):
        assert torch.equal(getattr(restored, name), getattr(weight, name)), name


def test_paired_entries_add_up_with_the_sign_of_the_other_half() -> None:
    every = torch.arange(-127, 128, dtype=torch.int8)
    low, high = (v.flatten() for v in torch.meshgrid(every, every, indexing="ij"))
    overflow = ((low == 127) & (high < 0)) | ((high == 127) & (low < 0))
    table = torch.zeros(len(low), ENTRIES, dtype=torch.int8)
    table[:, 3], table[:, 3 + ENTRIES // 2] = low, high
    paired = paired_entries(table[~overflow])
    assert paired is not None
    first, second = paired.int().chunk(2, -1)
    assert torch.equal(torch.cat((first - (second < 0).int(), second - (first < 0).int()), -1), table[~overflow].int())
    assert all(paired_entries(row[None]) is None for row in table[overflow][::7])


@pytest.mark.parametrize("negative", [14, 15])
def test_codebooks_without_room_for_pairs_need_none(device: torch.device, negative: int) -> None:
    generator = torch.Generator().manual_seed(negative)
    codebook = torch.cat((-torch.arange(1, negative + 1), torch.full((16 - negative,), 127)))
    indices = torch.randint(16, (5, 96), generator=generator, dtype=torch.uint8)
    weight = pack(indices, codebook.to(torch.int8).expand(5, 1, 16), torch.full((5, 1), 0.01).half())
    prepared = backend.prepare_linear(to(weight, device))
    assert (prepared.paired.numel() == 0) == (negative == 15)
    x = torch.randn(2, 96, generator=generator)
    y = backend.linear(x.to(device), prepared, activation_bits=8)
    expected = reference.codebook_linear(x.double(), weight, activation_bits=8)
    assert_within(y, expected, linear_tolerance(x, weight, 8))


@pytest.mark.parametrize("quantized", ["both", "gate_up"])
def test_restore_gives_back_experts_in_parts_joined(quantized: str) -> None:
    whole = random_experts(3, 40, 17, 33)
    assert isinstance(whole.gate_up, PackedWeight) and isinstance(whole.down, PackedWeight)
    down = in_parts(whole.down, 1) if quantized == "both" else torch.randn(3, 33, 17)
    restored = backend.restore(backend.prepare_experts(replace(whole, gate_up=in_parts(whole.gate_up, 2), down=down)))
    assert isinstance(restored, ExpertWeights) and isinstance(restored.gate_up, PackedWeight)
    assert all(torch.equal(getattr(restored.gate_up, s), getattr(whole.gate_up, s)) for s in SUFFIXES)
    if quantized == "both":
        assert isinstance(restored.down, PackedWeight) and torch.equal(restored.down.packed, whole.down.packed)


# ------------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_equal_the_twin_s(device: torch.device, bits: int) -> None:
    x = torch.randn(5, 83, generator=torch.Generator().manual_seed(1)) * 3
    x[1] = 1.25  # a constant token has no range
    x[2] = x[2].abs()
    expected = reference.quantize_activation(x, bits, 0.9)
    (high,), scale, zero = (t.cpu() for t in quantize(x.to(device), 1, bits, 0.9, Form.LEVELS, pdl=Launch.PLAIN))
    shift = 2 ** (bits - 1)
    assert torch.equal(high[:, :83].int() + shift, expected.level.int())
    assert not high[:, 83:].any()
    torch.testing.assert_close(scale, expected.step[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(zero, (expected.lo + shift * expected.step)[:, 0], rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("form, range_of_planes", [(Form.FIXED16, 65024), (Form.FIXED24, 16646144)])
def test_planes_hold_a_token_in_fixed_point(device: torch.device, form: Form, range_of_planes: int) -> None:
    x = torch.randn(6, 83, generator=torch.Generator().manual_seed(1)) * 3
    x[1], x[2, 0], x[3, 5] = 0.0, 1e30, -1e-30
    planes, scale, zero = (t.cpu().double() for t in quantize(x.to(device), 1, 16, 1.0, form, pdl=Launch.PLAIN))
    value = torch.zeros_like(planes[0])
    for plane in planes:
        value = value * 256 + plane
    peak = x.double().abs().amax(1, keepdim=True)
    assert not zero.any() and not value[:, 83:].any()
    # Half a step, and a float32 rounding of the step, of its inverse and of the product.
    error = (value[:, :83] * scale[:, None] - x.double()).abs()
    assert (error <= peak * (1 / range_of_planes + 3 * EPS)).all()


def test_float16_holds_bfloat16_exactly(device: torch.device) -> None:
    x = torch.randn(5, 83, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1], x[2], x[3], x[4, 0] = 0.0, x[2] * 1e37, x[3] * 1e-35, 2.0**20
    values, scale, zero = (t.cpu().double() for t in quantize(x.to(device), 1, 16, 1.0, Form.FLOAT16, pdl=Launch.PLAIN))
    restored = in_columns(values[0]) * scale[:, None]
    assert not zero.any() and not restored[:, 83:].any()
    assert torch.equal(restored[:, :83], x.double())


@pytest.mark.parametrize("form", [Form.LEVELS, Form.FIXED16])
def test_runs_alternate_in_pieces(device: torch.device, form: Form) -> None:
    x = torch.randn(3, 2 * 768, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    plain, pieces = (
        quantize(x, 2, 8 if form is Form.LEVELS else 16, 1.0, form, Launch.PLAIN, piece=piece).values.cpu()
        for piece in (None, 64)
    )
    alternating = plain.view(form.planes, 3, 2, 2, -1, 64).transpose(3, 4)  # [planes, rows, groups, halves, .., 64]
    assert torch.equal(pieces, alternating.reshape(pieces.shape))


def in_columns(values: Tensor) -> Tensor:
    """float16 [R, P] of `Activations` with one group, from the order of `lookup_pairs` to that of the columns."""
    quarter = values.shape[1] // 4
    order = [4 * i + 2 * quarter * half + 2 * part + j
             for half in (0, 1) for part in (0, 1) for i in range(quarter // 2) for j in (0, 1)]  # fmt: skip
    restored = torch.empty_like(values)
    restored[:, order] = values
    return restored


@triton.jit
def _bounded_steps(step, norm, out, inverse, COLUMNS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    found, found_inverse = bounded_step(tl.load(step + i), tl.load(norm + i), COLUMNS, GATED)
    tl.store(out + i, found)
    tl.store(inverse + i, found_inverse)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("columns", [256, 4096, 1408])
def test_a_bounded_step_holds_the_bound_in_float16(device: torch.device, columns: int, gated: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    step = 2.0 ** torch.randint(-30, 20, (64,), generator=generator)
    norm = torch.exp2(torch.randn(64, generator=generator) * 3)
    step[0], step[1], norm[2] = 2.0**-126, 2.0**113, 0.0  # of a token of zeros, of the largest one; of zero weights
    out, inverse = torch.empty(2, 64, device=device)
    _bounded_steps[(1,)](step.to(device), norm.to(device), out, inverse, columns, gated, 64)
    out, inverse = out.cpu().double(), inverse.cpu().double()
    assert (out * inverse == 1).all() and (torch.frexp(out).mantissa == 0.5).all()
    bound = norm.double() * columns**0.5 * 2**15 * step.double()
    peak = (bound**2 if gated else bound) * inverse
    assert (peak[[0, *range(2, 64)]] <= 2**15).all()
    assert (peak[3:] > 2**14).all()


# ------------------------------------------------------------------------------------------------------------ linear

LINEAR = [  # bits, group size, I, O, T
    (4, -1, 96, 20, 1),
    (4, -1, 200, 70, 3),
    (4, -1, 1096, 9, 2),
    (4, -1, 704, 65, 17),
    (3, -1, 50, 7, 9),
    (2, -1, 1, 1, 1),
    (4, -1, 64, 66, 140),
    (2, 64, 128, 33, 4),
    (4, 32, 96, 5, 5),
    (3, 192, 384, 66, 33),
]


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("bits, group_size, I, O, T", LINEAR)
def test_linear_equals_its_twin(
    device: torch.device, bits: int, group_size: int, I: int, O: int, T: int, activation_bits: int
) -> None:
    generator = torch.Generator().manual_seed(I + O + T)
    weight = random_weight((O, I), bits, group_size, generator)
    x = torch.randn(T, I, generator=generator) * torch.rand(T, 1, generator=generator).exp2()
    x[:, 0] *= 30  # an outlier channel
    bias = torch.randn(O, generator=generator)
    prepared = backend.prepare_linear(to(weight, device))
    y = backend.linear(x.to(device), prepared, bias.to(device), activation_bits, 0.95)
    expected = reference.codebook_linear(x.double(), weight, bias.double(), activation_bits, 0.95)
    assert_within(y, expected, linear_tolerance(x, weight, activation_bits) + EPS * (expected.abs() + bias.abs()))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEQUANT_A16", "exact")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("bits, group_size, I, O, T", LINEAR)
def test_exact_linear_equals_its_twin(device: torch.device, bits: int, group_size: int, I: int, O: int, T: int) -> None:
    """A column that the weights ignore is a million times larger than the others: 16 bits of fixed point would lose
    these, and the 24 of the decode kernel keep four."""
    generator = torch.Generator().manual_seed(I + O + T)
    weight = random_weight((O, I), bits, group_size, generator)
    x = torch.randn(T, I, generator=generator).bfloat16()
    if I > 1:
        weight = pack(
            unpack_indices(weight.packed, bits, I).index_fill(1, torch.tensor(0), 0), weight.codebook, weight.step
        )
        weight.codebook[..., 0, 0] = 0
        x[:, 0] = 2.0**20
    y = backend.linear(x.float().to(device), backend.prepare_linear(to(weight, device)))
    tolerance = linear_tolerance(x, weight, 16)
    if T <= dispatch.DECODED_TOKENS:
        tolerance += x.double().abs().amax() / 16646144 * unpack(weight).double().abs().sum(-1)
    assert_within(y, reference.codebook_linear(x.double(), weight), tolerance)


def test_modes_of_16_bits_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEQUANT_A16", "quick")
    with pytest.raises(InputError, match="CODEQUANT_A16: 'quick', expected fast or exact"):
        dispatch.exact_a16()


def test_linear_keeps_leading_dimensions_and_dtype(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = random_weight((12, 40), 4, -1, generator)
    prepared = backend.prepare_linear(to(weight, device))
    x = torch.randn(2, 3, 40, generator=generator).bfloat16()
    y = backend.linear(x.to(device), prepared)
    assert y.shape == (2, 3, 12) and y.dtype == torch.bfloat16
    expected = reference.codebook_linear(x.double(), weight)
    tolerance = linear_tolerance(x.view(6, 40), weight, 16).view(2, 3, 12)
    assert_within(y, expected, tolerance + torch.finfo(torch.bfloat16).eps * expected.abs())
    assert backend.linear(x[:, :0].to(device), prepared).shape == (2, 0, 12)


# ----------------------------------------------------------------------------------------------------------- experts


def random_experts(E: int, I: int, M: int, O: int, bits: int = 4, group_size: int = -1, **flags) -> ExpertWeights:
    generator = torch.Generator().manual_seed(E * I + M)
    has_gate = flags.get("has_gate", True)
    rows = 2 * M if has_gate else M
    flags.setdefault("apply_gate", lambda h: F.silu(h[:, :M]) * h[:, M:] if has_gate else F.silu(h))
    if flags.pop("bias", False):
        flags["gate_up_bias"] = torch.randn(E, rows, generator=generator)
        flags["down_bias"] = torch.randn(E, O, generator=generator)
    return ExpertWeights(
        random_weight((E, rows, I), bits, group_size, generator),
        random_weight((E, O, M), bits, group_size, generator),
        **flags,
    )


def moved(experts: ExpertWeights, device: torch.device) -> ExpertWeights:
    values = dict(vars(experts))
    for name, value in values.items():
        if isinstance(value, PackedWeight):
            values[name] = to(value, device)
        elif isinstance(value, Tensor):
            values[name] = value.to(device)
    return ExpertWeights(**values)


def random_routing(T: int, E: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    index = torch.rand(T, E, generator=generator).topk(k, dim=1).indices
    return index, torch.rand(T, k, generator=generator)


def check_experts(
    experts: ExpertWeights,
    device: torch.device,
    T: int,
    index: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Stage by stage, so that a level of the intermediate that lies near a tie cannot blur the comparison: the
    intermediate against its twin, then the result against the twin of `down` on the kernels' own intermediate."""
    E, k = len(experts.down.packed), index.shape[1]
    caught: list[Tensor] = []
    prepared = backend.prepare_experts(
        replace(moved(experts, device), down_transform=lambda h: caught.append(h.clone()) or h)
    )
    x = torch.randn(T, experts.gate_up.in_features, generator=torch.Generator().manual_seed(T)).to(dtype)
    index_there, weights_there = index.to(device), weights.to(device)
    y = backend.experts(x.to(device), index_there, weights_there, prepared)
    assert y.dtype == dtype
    whole = backend.experts(
        x.to(device), index_there, weights_there, replace(prepared, rest=replace(prepared.rest, down_transform=None))
    )
    layer_bits = max(experts.input_bits, experts.down_bits)
    in_pair_order = ops.generation(device).pick(layer_bits, T, T * k, E) is None
    order = torch.arange(T * k) if in_pair_order else ops.route(index_there, E, layer_bits)[0].cpu().long()
    hidden = torch.empty(T * k, experts.down.in_features, dtype=torch.float64)
    hidden[order] = caught[0].double().cpu()

    eps = torch.finfo(dtype).eps
    expected = torch.zeros(T, experts.down.out_features, dtype=torch.float64)
    tolerance = torch.zeros_like(expected)
    rounding = torch.zeros_like(expected)
    for pair, e in enumerate(index.flatten().tolist()):
        if not 0 <= e < E:
            continue
        t, w = pair // k, float(weights.flatten()[pair])
        up, down = (m.matrix(e) for m in (experts.gate_up, experts.down))
        bias = (None, None) if experts.down_bias is None else (experts.gate_up_bias[e], experts.down_bias[e])
        raw = reference.codebook_linear(x[t : t + 1].double(), up, bias[0], experts.input_bits, experts.input_clip)
        raw_error = linear_tolerance(x[t : t + 1], up, experts.input_bits) + 4 * max(eps, EPS) * raw.abs()
        # Every activation here has |f'| <= 1.2 and |f(g)| <= |g|: the error of f(g) * u, or of f(g).
        gate, up_part = raw.chunk(2, -1) if experts.has_gate else (raw, torch.ones_like(raw))
        gate_error, up_error = raw_error.chunk(2, -1) if experts.has_gate else (raw_error, torch.zeros_like(raw))
        h = experts.apply_gate(raw)
        h_error = (
            1.2 * gate_error * (up_part.abs() + up_error + 1) + gate.abs() * up_error + 8 * max(eps, EPS) * h.abs()
        )
        assert_within(hidden[pair], h[0], h_error[0])
        row = hidden[pair : pair + 1]
        out = reference.codebook_linear(row, down, bias[1], experts.down_bits, experts.down_clip)
        expected[t] += w * out[0]
        tolerance[t] += (
            abs(w) * (linear_tolerance(row, down, experts.down_bits) + 4 * max(eps, EPS) * (out.abs() + 1))[0]
        )
        rounding[t] += abs(w) * eps * (unpack(down).double().abs() @ row[0].abs())
    assert_within(y, expected, tolerance + eps * expected.abs())
    if ops.generation(device).form(layer_bits, T * k / E) is Form.FLOAT16 and not dispatch.exact_a16():
        assert_within(whole, expected, tolerance + rounding + eps * expected.abs())  # of the intermediate in between
    else:
        assert torch.equal(whole, y)


def check_random_routing(experts: ExpertWeights, device: torch.device, T: int, k: int, **kwargs) -> None:
    index, weights = random_routing(T, len(experts.down.packed), k, torch.Generator().manual_seed(T + k))
    check_experts(experts, device, T, index, weights, **kwargs)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "T, E, k, I, M, O", [(1, 5, 3, 72, 40, 33), (2, 3, 1, 50, 65, 9), (21, 7, 2, 136, 70, 66), (40, 2, 1, 64, 32, 5)]
)
def test_experts_equal_their_twin(
    device: torch.device, bits: int, T: int, E: int, k: int, I: int, M: int, O: int
) -> None:
    check_random_routing(random_experts(E, I, M, O, input_bits=bits, down_bits=bits), device, T, k)


@pytest.mark.parametrize("T", [1, 2, 11])
@pytest.mark.parametrize("bits, group_size", [(3, -1), (2, 32), (4, 64)])
def test_experts_of_every_width_and_group(device: torch.device, T: int, bits: int, group_size: int) -> None:
    check_random_routing(random_experts(3, 128, 64, 20, bits, group_size, input_bits=8, down_bits=16), device, T, 2)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize(
    "activation, has_gate",
    [("silu", True), ("gelu", True), ("gelu_pytorch_tanh", True), ("relu", False), ("silu", False)],
)
def test_every_fused_activation_with_biases(device: torch.device, T: int, activation: str, has_gate: bool) -> None:
    f = ACTIVATIONS[activation]
    gate = (lambda h: f(h[:, :24]) * h[:, 24:]) if has_gate else f
    experts = random_experts(
        4, 40, 24, 18, activation=activation, has_gate=has_gate, apply_gate=gate, bias=True, input_bits=8, down_bits=8
    )  # fmt: skip
    check_random_routing(experts, device, T, 2)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_own_gate_and_clip(device: torch.device, T: int) -> None:
    experts = random_experts(
        4, 40, 24, 18, activation=None, apply_gate=lambda h: h[:, :24].tanh() * (h[:, 24:] + 1), bias=True,
        input_bits=4, input_clip=0.9, down_bits=8, down_clip=0.8,
    )  # fmt: skip
    check_random_routing(experts, device, T, 2)


@pytest.mark.parametrize("T", [1, 2, 20])
def test_bfloat16_input(device: torch.device, T: int) -> None:
    check_random_routing(random_experts(4, 64, 48, 32, input_bits=8, down_bits=8), device, T, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize("T", [1, 2, 20])
@pytest.mark.parametrize("expert", [0, 5, -1])
def test_all_tokens_to_one_expert_or_to_none(device: torch.device, T: int, expert: int) -> None:
    """Experts 5 and -1 do not exist here: sentinels of expert parallelism, whose tokens get zeros."""
    index = torch.full((T, 2), expert)
    index[0, 0] = 2  # and one token that goes elsewhere
    weights = torch.rand(T, 2, generator=torch.Generator().manual_seed(0))
    check_experts(random_experts(5, 64, 32, 16, input_bits=8, down_bits=8), device, T, index, weights)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("I, M, bias, clip", [(72, 40, False, 1.0), (128, 64, True, 0.9), (600, 300, True, 1.0)])
def test_one_token_in_two_launches_equals_four(
    device: torch.device, bits: int, I: int, M: int, bias: bool, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same integers, up to levels near a tie of intermediates whose last bit differs. One pair goes nowhere."""
    experts = moved(random_experts(5, I, M, 33, input_bits=bits, down_bits=bits, input_clip=clip, bias=bias), device)
    prepared = backend.prepare_experts(experts)
    x = torch.randn(1, I, generator=torch.Generator().manual_seed(0)).to(device)
    index, weights = torch.tensor([[4, 0, 5]], device=device), torch.tensor([[0.5, 0.7, 0.3]], device=device)
    found = backend.experts(x, index, weights, prepared)
    monkeypatch.setattr(dispatch, "SINGLE_WORDS", 0)
    expected = backend.experts(x, index, weights, prepared)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * (1e-5 if bits > 4 else 1e-2))


def test_results_do_not_depend_on_the_batch(device: torch.device) -> None:
    """A token's result in a larger batch of the same kernel is bitwise the same."""
    experts = random_experts(6, 64, 32, 16, input_bits=8, down_bits=8)
    prepared = backend.prepare_experts(moved(experts, device))
    generator = torch.Generator().manual_seed(0)
    index, weights = random_routing(24, 6, 2, generator)
    x = torch.randn(24, 64, generator=generator)
    x, index, weights = x.to(device), index.to(device), weights.to(device)
    whole = backend.experts(x, index, weights, prepared)
    assert torch.equal(whole[:10], backend.experts(x[:10], index[:10], weights[:10], prepared))


# ------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("bits, group_size, O, I", [(4, -1, 20, 200), (3, 64, 5, 128), (2, 8, 33, 24), (4, -1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantized_weights_are_the_rounded_ones(
    device: torch.device, bits: int, group_size: int, O: int, I: int, dtype: torch.dtype
) -> None:
    weight = random_weight((2, O, I), bits, group_size, torch.Generator().manual_seed(I))
    found = dequantize(backend.prepare_linear(to(weight, device)), dtype)
    exact = unpack(weight)  # the interpreter cuts bfloat16 off: a whole unit of the last place, or of subnormals
    assert_within(found, exact, torch.finfo(dtype).eps * exact.abs() + 2**-24)


@pytest.fixture
def soon_dense(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens count as very many."""
    generation = replace(dispatch.generation(device), dense_tokens=8)
    monkeypatch.setattr(ops, "generation", lambda _: generation)


@pytest.mark.usefixtures("soon_dense")
@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_meet_a_dequantized_matrix(device: torch.device, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight((10, 36), 4, -1, generator), torch.randn(8, 36, generator=generator).bfloat16()
    b = torch.randn(10, generator=generator) if bias else None
    y = backend.linear(x.to(device), backend.prepare_linear(to(weight, device)), None if b is None else b.to(device))
    expected = reference.codebook_linear(x.double(), weight, None if b is None else b.double())
    # Every weight is rounded, by up to a unit of the last place; so are the bias and the result, each by half of one.
    magnitude = x.double().abs() @ unpack(weight).double().abs().T
    tolerance = torch.finfo(torch.bfloat16).eps * (magnitude + expected.abs() + (0 if b is None else b.abs()))
    assert_within(y, expected, tolerance)


# ------------------------------------------------------------------------------------------------------- other forms


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "T, E, k, I, M, O", [(1, 5, 3, 72, 40, 33), (2, 12, 1, 50, 65, 9), (21, 7, 2, 136, 70, 66), (40, 2, 1, 64, 32, 5)]
)
def test_exact_experts_equal_their_twin(device: torch.device, T: int, E: int, k: int, I: int, M: int, O: int) -> None:
    check_random_routing(random_experts(E, I, M, O), device, T, k, dtype=torch.bfloat16)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("T", [2, 11])
def test_exact_experts_with_groups_and_biases(device: torch.device, T: int) -> None:
    check_random_routing(random_experts(3, 128, 64, 20, 3, 32, bias=True), device, T, 2, dtype=torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["one role", "two roles"])
def specialized(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=["int8", "two planes", "float16", "exact"])
def overlapped(
    request: pytest.FixtureRequest, specialized: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Lookups beside products for every batch; the activations' bits."""
    if device.type != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    tile = Tile(64, 128, 4, 3, overlap=True, span=3)
    large = replace(tile, rows=128, bytes=64, warps=8, stages=4)
    if specialized:
        tile, large = replace(tile, registers=128, specialized=True), replace(large, registers=168, specialized=True)
    blocks = (dispatch._uniform(float("inf"), 64, tile, large),)
    linear = (dispatch.LinearConfig(float("inf"), 64, tile),)
    forms = (Form.LEVELS, Form.FIXED16, Form.FLOAT16)
    generation = replace(
        dispatch.HOPPER, grouped=dict.fromkeys(forms, blocks), linear=dict.fromkeys(forms, linear),
        fixed_density=-1 if request.param == "float16" else float("inf"),
    )  # fmt: skip
    monkeypatch.setattr(ops, "generation", lambda _: generation)
    if request.param == "exact":
        monkeypatch.setenv("CODEQUANT_A16", "exact")
    return 8 if request.param == "int8" else 16


@pytest.mark.parametrize(
    "T, E, k, I, M, O",
    [
        (21, 7, 2, 384, 256, 66),
        (150, 3, 1, 256, 384, 300),
        (150, 3, 1, 896, 512, 300),
        (9, 5, 5, 512, 640, 8),
        (20, 2, 1, 128, 256, 7),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_overlapped_experts_equal_their_twin(
    device: torch.device, overlapped: int, T: int, E: int, k: int, I: int, M: int, O: int, bias: bool
) -> None:
    experts = random_experts(E, I, M, O, bias=bias, input_bits=overlapped, down_bits=overlapped)
    check_random_routing(experts, device, T, k, dtype=torch.bfloat16)


def test_blocks_of_any_number_of_tokens(device: torch.device, overlapped: int) -> None:
    """An expert's last block takes a quarter, a half or all of the products."""
    lengths = torch.tensor([1, 16, 0, 17, 32, 33, 47, 48, 49, 64, 65, 100])
    index = torch.arange(len(lengths)).repeat_interleave(lengths)[:, None]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    experts = random_experts(len(lengths), 384, 256, 136, input_bits=overlapped, down_bits=overlapped)
    check_experts(experts, device, len(index), index, torch.ones(index.shape), dtype=torch.bfloat16)


@pytest.mark.parametrize("overlapped", ["float16"], indirect=True)
@pytest.mark.parametrize("has_gate", [True, False])
def test_an_intermediate_is_ready_for_the_next_product(device: torch.device, overlapped: int, has_gate: bool) -> None:
    T, E, I, M = 70, 3, 512, 384
    experts = random_experts(
        E, I, M, 64, has_gate=has_gate, activation="silu" if has_gate else "relu", input_bits=overlapped,
        down_bits=overlapped,
    )  # fmt: skip
    index, _ = random_routing(T, E, 2, torch.Generator().manual_seed(0))
    rows = unpack(experts.gate_up).double()  # [E, M or 2M, I]
    x = torch.randn(T, I, generator=torch.Generator().manual_seed(1)).double()
    x[0], x[1], x[2] = 0, x[1] * 1e-12, x[2] * 1e9
    for t in range(3, 20):  # as large a result as there can be: x along a row, all elements as large as the largest
        x[t] = rows[index[t, 0], t + (M if has_gate else 0)].sign() * 2.0**t
    x = x.bfloat16()
    first, second = (
        ops.Matrix(backend.to_triton(to(m, device)), None, overlapped, 1.0) for m in (experts.gate_up, experts.down)
    )
    there = index.to(device)
    plan = ops.make_plan(there, E, overlapped)
    lists = ops.run_route(there, plan)
    ready = ops.run_up(x.to(device), there, lists, plan, first, has_gate, experts.activation, next_down=second)
    assert isinstance(ready, Activations)
    values, scale = ready.values[0].double().cpu(), ready.scale.double().cpu()
    assert (values.abs() <= 2**15).all() and (values.abs().amax(1) > 0).sum() >= 2 * T - 4
    hidden = in_columns(values) * scale[:, None]
    for position, pair in enumerate(lists.pair.tolist()):
        t, e = pair // 2, int(index.flatten()[pair])
        raw = rows[e] @ x[t].double()
        h = F.silu(raw[:M]) * raw[M:] if has_gate else raw.relu()
        magnitude = rows[e].abs() @ x[t].double().abs()
        error = (8 + I / 16) * EPS * (
            magnitude[:M] * (raw[M:].abs() + 1) * 2 + raw[:M].abs() * magnitude[M:] if has_gate else magnitude
        )  # fmt: skip
        assert_within(hidden[position], h, 2 * error + 2.0**-11 * h.abs() + 2.0**-25 * scale[position])


@pytest.mark.parametrize("activation, has_gate", [("gelu", True), ("relu", False), (None, True)])
def test_overlapped_experts_of_other_kinds(
    device: torch.device, overlapped: int, activation: str | None, has_gate: bool
) -> None:
    f = ACTIVATIONS[activation or "silu"]
    gate = (lambda h: f(h[:, :256]) * h[:, 256:]) if has_gate else f
    experts = random_experts(
        4, 256, 256, 40, activation=activation, has_gate=has_gate, apply_gate=gate, bias=True, input_bits=overlapped,
        down_bits=overlapped,
    )  # fmt: skip
    index, weights = random_routing(70, 4, 2, torch.Generator().manual_seed(0))
    index[:5], index[7, 1] = 4, -1  # nobody's
    check_experts(experts, device, 70, index, weights, dtype=torch.bfloat16)


@pytest.mark.parametrize("O, I, T", [(200, 384, 3), (64, 256, 65), (5, 1408, 130)])
def test_overlapped_linear_equals_its_twin(device: torch.device, overlapped: int, O: int, I: int, T: int) -> None:
    generator = torch.Generator().manual_seed(I + O + T)
    weight = random_weight((O, I), 4, -1, generator)
    x = torch.randn(T, I, generator=generator).bfloat16()
    bias = torch.randn(O, generator=generator)
    prepared = backend.prepare_linear(to(weight, device))
    y = backend.linear(x.float().to(device), prepared, bias.to(device), overlapped)
    expected = reference.codebook_linear(x.double(), weight, bias.double(), overlapped)
    assert_within(y, expected, linear_tolerance(x, weight, overlapped) + EPS * (expected.abs() + bias.abs()))


# ----------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(
    "pairs, E, block", [(1, 1, 16), (48, 5, 16), (600, 40, 16), (1100, 3, 128), (2500, 30, 64), (17000, 9, 128)]
)
def test_blocks_cover_every_routed_pair_once(device: torch.device, pairs: int, E: int, block: int) -> None:
    expert = torch.randint(-1, E + 1, (pairs,), generator=torch.Generator().manual_seed(pairs))
    lists = routing.route(expert.to(device), E, block, pdl=Launch.PLAIN)
    pair, block_expert, block_start, block_end = (t.cpu().long() for t in lists.tensors)
    sentinels_last = torch.where((expert >= 0) & (expert < E), expert, E)
    assert torch.equal(pair, sentinels_last.argsort(stable=True))  # in their order, so that results are reproducible
    seen = []
    for b in range(routing.max_blocks(pairs, E, block)):
        e = int(block_expert[b])
        if e < E:
            positions = range(int(block_start[b]), int(block_end[b]))
            assert len(positions) > 0
            assert (expert[pair[list(positions)]] == e).all()
            seen += positions
    assert sorted(seen) == list(range(int((sentinels_last < E).sum())))


# --------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("T", [1, 2, 12])
def test_operators_are_registered_correctly(device: torch.device, T: int) -> None:
    experts = moved(random_experts(3, 40, 24, 16, bias=True), device)
    up, down = backend.prepare_experts(experts).gate_up, backend.prepare_experts(experts).down
    index, weights = (t.to(device) for t in random_routing(T, 3, 2, torch.Generator().manual_seed(0)))
    x = torch.randn(T, 40, device=device)
    lists = ops.route(index, 3, 8)
    up_arguments = (up.tensors, 40, experts.gate_up_bias, 8, 1.0, True, "silu")
    down_arguments = (down.tensors, 24, experts.down_bias, 8, 1.0)
    hidden = ops.expert_up(x, index, lists, *up_arguments, 8)
    one = backend.prepare_linear(experts.down.matrix(0))
    checks = [
        (ops.linear, (hidden, one.tensors, 24, None, 8, 1.0)),
        (ops.expert_up, (x, index, lists, *up_arguments, 8)),
        (ops.expert_down, (hidden, index, weights, lists, *down_arguments, 8)),
        (ops.experts, (x, index, weights, *up_arguments, *down_arguments)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 200])
def test_compile_and_cuda_graph_give_the_eager_result(T: int) -> None:
    device = torch.device("cuda")
    prepared = backend.prepare_experts(moved(random_experts(8, 256, 128, 256, input_bits=8, down_bits=8), device))
    generator = torch.Generator().manual_seed(T)
    index, weights = (t.to(device) for t in random_routing(T, 8, 2, generator))
    x = torch.randn(T, 256, generator=generator).to(device, torch.bfloat16)
    eager = backend.experts(x, index, weights, prepared)
    compiled = torch.compile(backend.experts, fullgraph=True)(x, index, weights, prepared)
    assert torch.equal(eager, compiled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.experts(x, index, weights, prepared)
    other_index, other_weights = (t.to(device) for t in random_routing(T, 8, 2, generator))
    other_x = torch.randn(T, 256, generator=generator).to(device, torch.bfloat16)
    expected = backend.experts(other_x, other_index, other_weights, prepared)
    x.copy_(other_x), index.copy_(other_index), weights.copy_(other_weights)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability, kibibytes", [(89, 99), (90, 227)])
def test_every_tile_compiles_and_fits_into_shared_memory(capability: int, kibibytes: int) -> None:
    """Of a program on a GPU of this compute capability; no other that the backend runs on has less than 8.9."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_shared_memory.py")
    run = subprocess.run([sys.executable, script, str(capability)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) > 10
    too_large = [line for line in lines if int(line.split()[0]) > kibibytes * 1024]
    assert not too_large
