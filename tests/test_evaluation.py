"""Evaluation: zero for equal models, equal to independent arithmetic for different ones, blind to the basis."""

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, quantize_rtn_checkpoint, random_model
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import codequant
from codequant import evaluation
from codequant.errors import InputError, VerificationError
from codequant.evaluation import context_length, decoder_layers, evaluate, relative_errors, render, set_changes
from codequant.quantization_config import QuantizationConfig, Scheme

# Of the Qwen3-MoE model in helpers; the first of its three layers is dense, the others have 5 experts, 2 per token.
V, H = 67, 48


def random_windows(count: int = 5, length: int = 13) -> Tensor:
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_does_not_differ_from_its_copy(family: str) -> None:
    model = random_model(family)
    result = evaluate(model, random_windows(), copy.deepcopy(model))
    assert result.tokens == 5 * 12
    assert result.perplexity == result.reference_perplexity
    assert result.kl is not None and abs(result.kl) < 1e-6
    assert result.router_change == 0
    assert [layer.layer for layer in result.layers] == list(range(model.config.num_hidden_layers))
    assert all(layer.error == 0 for layer in result.layers)
    dense = [0] if family in ("qwen3_moe", "deepseek_v2") else []
    assert [layer.layer for layer in result.layers if layer.router_change is None] == dense


def test_numbers_equal_independent_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, windows = random_model("qwen3_moe", 0), random_model("qwen3_moe", 1), random_windows()
    with torch.no_grad():
        q, p = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for m in (model, reference))
    targets = windows[:, 1:].flatten()
    results = [evaluate(model, windows, reference)]
    monkeypatch.setattr(evaluation, "BATCH_LOGITS", 2 * 13 * V)  # two windows at a time, the last one alone
    monkeypatch.setattr(evaluation, "CHUNK_LOGITS", 7 * V)  # seven of 24 rows
    results.append(evaluate(model, windows, reference))
    for result in results:
        # float32 log-probabilities of a magnitude up to about 20: eps * 20 each, and the mean is no worse.
        tolerance = 20 * torch.finfo(torch.float32).eps
        assert math.log(result.perplexity) == pytest.approx(float(F.nll_loss(q, targets)), abs=tolerance)
        assert math.log(result.reference_perplexity) == pytest.approx(float(F.nll_loss(p, targets)), abs=tolerance)
        assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2 * tolerance)
        assert result.kl > 0.1  # otherwise nothing was compared


def test_a_model_alone_has_a_perplexity() -> None:
    model, windows, done = random_model("qwen3_moe"), random_windows(), []
    result = evaluate(model, windows, bits_per_weight=4.25, advance=done.append)
    with torch.no_grad():
        assert result.perplexity == pytest.approx(float(model(windows, labels=windows).loss.exp()), rel=1e-5)
    assert (result.kl, result.router_change, result.layers, sum(done)) == (None, None, (), 5)
    assert result.to_dict()["bits_per_weight"] == 4.25


def test_renumbered_experts_change_the_router_and_nothing_else() -> None:
    reference = random_model("qwen3_moe")
    model, layer = copy.deepcopy(reference), 1
    mlp = decoder_layers(model)[layer].mlp
    with torch.no_grad():
        for weight in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
            weight.copy_(weight.roll(1, 0))  # expert e becomes e + 1: no set of 2 out of 5 is its own image
    result = evaluate(model, random_windows(), reference)
    assert [layer.router_change for layer in result.layers] == [None, 1, 0]
    assert result.router_change == 0.5
    # Only the order in which two experts' outputs are added may differ: a rounding error, squared by the divergence.
    assert result.kl is not None and abs(result.kl) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_folder_is_traced_like_its_source(family: str, tmp_path: Path) -> None:
    source = random_model(family)
    scheme = Scheme(activation_bits=16)
    dequantized = quantize_rtn_checkpoint(source, tmp_path, QuantizationConfig(scheme, ignore=("lm_head", "*.gate")))
    model, _ = codequant.load(tmp_path)
    against_source, against_weights = (evaluate(model, random_windows(), other) for other in (source, dequantized))
    assert against_source.kl > 1e-4 and max(layer.error for layer in against_source.layers) > 1e-2
    # The same weights in other kernels: rounding errors of float32, which add up to far less than this.
    assert abs(against_weights.kl) < 1e-6 and against_weights.router_change == 0
    assert max(layer.error for layer in against_weights.layers) < 1e-4


def test_set_changes_ignore_the_order() -> None:
    chosen, reference = torch.tensor([[0, 1, 4], [2, 3, 0], [1, 2, 3]]), torch.tensor([[4, 0, 1], [2, 4, 0], [3, 2, 1]])
    assert set_changes(chosen, reference).tolist() == [False, True, False]


def rotated(model: PreTrainedModel, rotation: Tensor) -> PreTrainedModel:
    """The same function with another residual basis; the model's norm gains must be all one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.copy_(rotation.T @ weight)
            elif weight.shape[-1] == H and weight.dim() > 1:
                weight.copy_(weight @ rotation)
    return model


def test_layer_errors_are_measured_in_the_rotated_basis() -> None:
    reference, windows = random_model("qwen3_moe"), random_windows()
    for name, weight in reference.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1)
    rotation = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(2)))[0]
    model = rotated(reference, rotation)
    same = evaluate(model, windows, reference, rotation)
    assert same.kl is not None and abs(same.kl) < 1e-6 and same.router_change == 0
    assert max(layer.error for layer in same.layers) < 1e-4
    assert min(layer.error for layer in evaluate(model, windows, reference).layers) > 0.5


def test_relative_errors_are_per_token() -> None:
    reference = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    output = reference + torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert relative_errors(output, reference, None).tolist() == pytest.approx([1 / 5, 1 / 5000, 0])


def test_windows_longer_than_the_context_are_refused() -> None:
    model = random_model("qwen3_moe")
    assert (context_length(model, 512), context_length(model, 16)) == (128, 16)
    with pytest.raises(InputError, match="windows: 129 tokens, expected at most 128"):
        evaluate(model, random_windows(length=129))


def test_logits_that_are_not_finite_are_refused() -> None:
    reference = random_model("qwen3_moe")
    model = copy.deepcopy(reference)
    model.get_output_embeddings().weight.data[3, 5] = math.nan
    with pytest.raises(VerificationError, match=r"loss nan \(reference [0-9.e+]+\)"):
        evaluate(model, random_windows(), reference)


def test_rendered_table_has_what_was_measured() -> None:
    def text(result: evaluation.Evaluation) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(render(result))
        return capture.get()

    model = random_model("qwen3_moe")
    alone = text(evaluate(model, random_windows()))
    assert "perplexity" in alone and "KL" not in alone and "bits" not in alone
    both = text(evaluate(model, random_windows(), random_model("qwen3_moe", 1), bits_per_weight=4.256))
    for expected in ("KL divergence", "router change", "layer error", "4.26", "60"):
        assert expected in both
