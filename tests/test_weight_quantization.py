import math

import pytest
import torch
from torch import Tensor

from codequant.error_feedback import damped
from codequant.native import library
from codequant.packing import pack, unpack
from codequant.weight_quantization import WeightOptions, quantize_weight, target_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def layer(B: int, O: int, I: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """A weight [B, O, I] and the second moment [B, I, I] of correlated inputs whose mean is `offset` per channel."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(B, O, I, generator=generator) * 0.02
    mixing = torch.eye(I) + torch.randn(B, I, I, generator=generator) / math.sqrt(I)
    inputs = torch.randn(B, 4 * I, I, generator=generator) @ mixing + offset
    return weight, inputs.mT @ inputs / (4 * I)


@pytest.mark.parametrize("method", ["rtn", "kmeans", "weighted", "hessian"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("B, O, I, group_size", [(2, 5, 33, -1), (1, 1, 1, -1), (3, 4, 66, 11), (2, 3, 70, 1)])
def test_shapes_packing_and_error(method, bits, B, O, I, group_size):
    weight, hessian = layer(B, O, I)
    q = quantize_weight(weight, hessian, None, WeightOptions(bits=bits, group_size=group_size, method=method))
    G = 1 if group_size == -1 else I // group_size
    assert q.indices.shape == (B, O, I) and q.indices.dtype == torch.uint8
    assert q.codebook.shape == (B, O, G, 2**bits) and q.codebook.dtype == torch.int8
    assert q.step.shape == (B, O, G) and q.step.dtype == torch.float16
    value = unpack(pack(q.indices, q.codebook, q.step))
    assert torch.equal(value, q.dequantized())
    h = damped(hessian, 0.01).double()
    e, w = (value - weight).double(), weight.double()
    expected = ((e @ h) * e).sum((-2, -1)) / ((w @ h) * w).sum((-2, -1))
    torch.testing.assert_close(q.error, expected, rtol=1e-4, atol=1e-9)
    if B and method != "rtn" and 2**bits >= I // G:  # an entry for every weight: only the int8 rounding remains
        assert float((value - weight).abs().max()) <= 0.5 / 127 * 1.001 * float(weight.abs().max())


@pytest.mark.parametrize("method", ["rtn", "kmeans", "weighted", "hessian"])
def test_an_empty_stack_gives_an_empty_result(method):
    q = quantize_weight(torch.empty(0, 4, 8), torch.empty(0, 8, 8), None, WeightOptions(method=method))
    assert (q.indices.shape, q.codebook.shape, q.step.shape) == ((0, 4, 8), (0, 4, 1, 16), (0, 4, 1))
    assert q.error.shape == (0,)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_method_beats_the_one_before(bits, group_size):
    weight, hessian = layer(3, 40, 96)
    errors = [
        quantize_weight(weight, hessian, None, WeightOptions(bits, group_size, method)).error
        for method in ("rtn", "kmeans", "hessian")
    ]
    assert bool((errors[1] < errors[0]).all()) and bool((errors[2] < 0.8 * errors[1]).all())


def test_rounds_and_feedback_pay():
    weight, hessian = layer(2, 64, 128)
    errors = [
        float(quantize_weight(weight, hessian, None, WeightOptions(bits=3, rounds=rounds)).error.mean())
        for rounds in (0, 1, 2)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("method", ["rtn", "kmeans", "weighted", "hessian"])
def test_zero_rows_columns_and_dead_channels(method):
    weight, hessian = layer(2, 6, 40)
    weight[0, 2] = 0
    weight[:, :, 7] = 0
    hessian[0, 5], hessian[0, :, 5] = 0, 0  # a channel that never fires
    hessian[1] = 0  # an expert that no token reached
    q = quantize_weight(weight, hessian, None, WeightOptions(method=method))
    assert float(q.step[0, 2].abs().max()) == 0 and bool((q.dequantized()[0, 2] == 0).all())
    assert bool(torch.isfinite(q.error).all()) and bool((q.error < 0.05).all())
    # A dead channel, and all channels of an expert without tokens, keep their weights by the plain distance.
    plain = (q.dequantized() - weight)[1].square().mean() / weight[1].square().mean()
    assert float(plain) < 0.02
    assert float((q.dequantized() - weight)[0, :, 5].abs().max()) < 0.25 * float(weight[0, :, 5].abs().max())


def test_a_shared_hessian_equals_its_copies_and_stacks_are_independent():
    weight, hessian = layer(3, 140, 48)
    options = WeightOptions(bits=3, group_size=16)
    shared = quantize_weight(weight, hessian[0], None, options)
    copied = quantize_weight(weight, hessian[:1].expand(3, -1, -1), None, options)
    alone = quantize_weight(weight[1:2], hessian[0], None, options)
    for name in ("indices", "codebook", "step"):
        assert torch.equal(getattr(shared, name), getattr(copied, name))
        assert torch.equal(getattr(shared, name)[1:2], getattr(alone, name))


@pytest.mark.skipif(library() is None, reason="native library not built")
@pytest.mark.parametrize("method", ["rtn", "kmeans", "weighted", "hessian"])
def test_threads_do_not_change_the_result(method):
    weight, hessian = layer(3, 150, 96)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)  # also those of the matrix products and factorisations
            target = target_weight(weight, hessian, hessian + hessian.mT.roll(1, -1) * 0.01, 0.5, 0.01)
            results.append(quantize_weight(weight, hessian, target, WeightOptions(method=method), threads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("indices", "codebook", "step"):
            assert torch.equal(getattr(other, name), getattr(results[0], name))


def test_hessian_method_keeps_the_mean_of_a_row_where_inputs_have_one():
    """Asymmetric activations put a large common offset into the inputs: H grows a direction along (1, ..., 1), and an
    error in a row's sum is multiplied by that offset. Free entries make the sum exact at almost no cost elsewhere."""
    weight, hessian = layer(1, 64, 128, offset=20.0)

    def error_in_sum(method: str) -> Tensor:
        """|sum of errors| over the norm of the errors, which is 0.67 for independent ones; median over the rows."""
        error = quantize_weight(weight, hessian, None, WeightOptions(method=method)).dequantized() - weight
        return (error.sum(-1).abs() / error.square().sum(-1).sqrt()).median()

    rtn, plain, hessian_method = map(error_in_sum, ("rtn", "kmeans", "hessian"))  # 0.79, 0.24, 0.07
    assert float(hessian_method) < 0.5 * float(plain) < 0.25 * float(rtn)


def test_target_is_the_least_squares_correction():
    """alpha = 1 without damping: the regression of W x on the new inputs y, found here from the samples themselves."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 12, generator=generator)
    x = torch.randn(2, 400, 12, generator=generator)
    y = x + 0.3 * torch.randn(2, 400, 12, generator=generator)
    hessian, cross = y.mT @ y / 400, x.mT @ y / 400
    expected = torch.linalg.lstsq(y.double(), (x @ weight.mT).double()).solution.mT.float()
    full = target_weight(weight, hessian, cross, 1.0, 1e-9)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    half = target_weight(weight, hessian, cross, 0.5, 1e-9)
    torch.testing.assert_close(half, (weight + expected) / 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(target_weight(weight, hessian, cross, 0.0, 0.01), weight)
    assert torch.equal(target_weight(weight, hessian, hessian, 1.0, 0.01), weight)
    one = target_weight(weight, hessian[0], cross[0], 0.5, 0.01)
    torch.testing.assert_close(one[0], target_weight(weight, hessian, cross, 0.5, 0.01)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 5}, "bits: 5"),
        ({"group_size": 0}, "group_size: 0"),
        ({"method": "gptq"}, "method: 'gptq'"),
        ({"rounds": -1}, "rounds: -1"),
        ({"sweeps": -1}, "sweeps: -1"),
        ({"ridge": 0.0}, "ridge: 0.0"),
        ({"damp": math.nan}, "damp: nan"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        WeightOptions(**changes)


def test_bad_tensors_are_named():
    weight, hessian = layer(2, 4, 8)
    options = WeightOptions()
    with pytest.raises(ValueError, match="hessian: None"):
        quantize_weight(weight, None, None, options)
    with pytest.raises(ValueError, match="hessian: shape"):
        quantize_weight(weight, hessian[:1], None, options)
    with pytest.raises(ValueError, match="hessian: found NaN"):
        quantize_weight(weight, hessian * torch.nan, None, options)
    with pytest.raises(ValueError, match="weight: found NaN"):
        quantize_weight(weight / 0, hessian, None, options)
    with pytest.raises(ValueError, match="target: shape"):
        quantize_weight(weight, hessian, weight[:1], options)
    with pytest.raises(ValueError, match="group_size: 3, expected"):
        quantize_weight(weight, hessian, None, WeightOptions(group_size=3))
