import pytest
import torch
from torch import Tensor

from codequant.error_feedback import lookup
from codequant.finetuning import FinetuneOptions, dequantize, finetune, moe_loss, relative_mse, router_kl
from codequant.packing import round_codebook
from codequant.weight_quantization import WeightOptions, quantize_weight


def quantized_layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight [8, 24], indices, centroids, correlated inputs [512, 24]); plain k-means leaves room to gain."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 24, generator=generator)
    inputs = torch.randn(512, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    q = quantize_weight(weight[None], None, None, WeightOptions(bits=2, group_size=12, method="kmeans"))
    return weight, q.indices[0], (q.codebook.float() * q.step.float().unsqueeze(-1))[0], inputs


def layer_loss(weight: Tensor, indices: Tensor):
    return lambda values, x: relative_mse(x @ dequantize(indices, values["centroids"]).T, x @ weight.T)


def test_dequantize_gives_the_stored_weight_and_the_gradient_of_a_gather():
    _, indices, centroids, _ = quantized_layer()
    centroids = (centroids * 1.01).requires_grad_()
    value = dequantize(indices, centroids)
    entries, step = round_codebook(centroids.detach())
    assert torch.equal(value, lookup(entries.float() * step.float().unsqueeze(-1), indices))
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(value, centroids, upstream)
    (expected,) = torch.autograd.grad(lookup(centroids, indices), centroids, upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=24 * 2**-23 * float(upstream.abs().max()))


def test_finetuning_lowers_the_heldout_loss_of_the_rounded_codebook():
    weight, indices, centroids, inputs = quantized_layer()
    loss = layer_loss(weight, indices)
    train, heldout = inputs[:384].split(96), [inputs[384:]]
    result = finetune({"centroids": centroids}, loss, train, heldout, FinetuneOptions(learning_rate=0.03, epochs=20))
    assert result.kept and result.heldout_after < 0.8 * result.heldout_before
    entries, step = round_codebook(result.parameters["centroids"])
    stored = lookup(entries.float() * step.float().unsqueeze(-1), indices)
    assert float(relative_mse(heldout[0] @ stored.T, heldout[0] @ weight.T)) == pytest.approx(
        result.heldout_after, 1e-6
    )


def test_what_does_not_help_is_dropped_bit_for_bit():
    """Training towards another weight raises the held-out loss from the first step."""
    weight, indices, centroids, inputs = quantized_layer()
    misled = [(inputs[:256], -weight)]
    heldout = [(inputs[256:], weight)]

    def loss(values: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, wanted = batch
        return relative_mse(x @ dequantize(indices, values["centroids"]).T, x @ wanted.T)

    original = centroids.clone()
    result = finetune({"centroids": centroids}, loss, misled, heldout, FinetuneOptions(epochs=9, patience=3))
    assert not result.kept and result.heldout_after == result.heldout_before
    assert result.parameters["centroids"] is centroids and torch.equal(centroids, original)
    assert result.steps == 3  # patience


def test_a_loss_that_becomes_nan_is_dropped():
    centroids = torch.ones(1, 1, 4)
    calls = iter(range(100))

    def loss(values: dict[str, Tensor], batch: int) -> Tensor:
        return values["c"].sum() * (1.0 if next(calls) == 0 else torch.nan)

    result = finetune({"c": centroids}, loss, [0], [0], FinetuneOptions())
    assert not result.kept and result.parameters["c"] is centroids


def test_steps_are_relative_to_each_row_and_zero_rows_stay():
    values = torch.tensor([[1.0, -1.0], [1e-4, -1e-4], [0.0, 0.0]])
    result = finetune(
        {"v": values}, lambda p, _: (p["v"] * values).sum(), [0], [0], FinetuneOptions(learning_rate=0.01, epochs=1)
    )
    torch.testing.assert_close(result.parameters["v"], values * 0.99, rtol=1e-4, atol=0)


def test_router_kl():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert float(router_kl(logits, logits + 5)) == pytest.approx(0, abs=1e-6)
    other = torch.tensor([[0.0, torch.tensor(3.0).log()], [1.0, 3.0]])  # (1/4, 3/4) for (1/2, 1/2)
    expected = 0.5 * (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log())
    assert float(router_kl(logits, other)) == pytest.approx(float(expected), rel=1e-5)
    output, reference = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    total = moe_loss(output, reference, other, logits, router_weight=0.5)
    assert float(total) == pytest.approx(1 / 8 + 0.5 * float(expected), rel=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="heldout_batches: empty"):
        finetune({"v": torch.ones(1)}, lambda p, _: p["v"].sum(), [0], [], FinetuneOptions())
    with pytest.raises(ValueError, match=r"learning_rate: 0"):
        FinetuneOptions(learning_rate=0)
    with pytest.raises(ValueError, match="patience: 0"):
        FinetuneOptions(patience=0)
