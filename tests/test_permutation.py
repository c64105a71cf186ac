from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import random_model
from safetensors.torch import load_file
from sources import SMALL, write_source
from torch import Tensor
from torch.nn import functional as F

import codequant
from codequant.folding import head_blocks
from codequant.permutation import clustering_error, group_order, move_columns, move_rows, pair_order, producer_order
from codequant.pipeline import quantize
from codequant.structure import ChannelPair


def experts(E: int = 3, M: int = 24, H: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (E, M, H), "up": (E, M, H), "up_bias": (E, M), "down": (E, H, M)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def feed_forward(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    hidden = F.silu(x @ w["gate"].mT) * (x @ w["up"].mT + w["up_bias"].unsqueeze(-2))
    return hidden @ w["down"].mT


def test_permuting_a_pair_keeps_the_function_of_every_expert():
    w = experts()
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    gate, up, up_bias = (move_rows(w[name], order) for name in ("gate", "up", "up_bias"))
    down = move_columns(w["down"], order)
    assert not torch.equal(down, w["down"])
    moved = {"gate": gate, "up": up, "up_bias": up_bias, "down": down}
    torch.testing.assert_close(feed_forward(x, moved), feed_forward(x, w), rtol=0, atol=1e-12)


def test_permuting_heads_keeps_grouped_query_attention():
    heads, kv_heads, D, H, T = 6, 2, 8, 5, 7
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(kv_heads * D, H, generator=generator, dtype=torch.float64)
    o = torch.randn(H, heads * D, generator=generator, dtype=torch.float64)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    attention = torch.rand(heads, T, T, generator=generator, dtype=torch.float64)

    def output(v: Tensor, o: Tensor) -> Tensor:
        value = (x @ v.T).view(T, kv_heads, D).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        return (attention @ value).transpose(0, 1).reshape(T, heads * D) @ o.T

    row_of_column = torch.arange(kv_heads * D).view(kv_heads, D).repeat_interleave(heads // kv_heads, 0).flatten()
    pair = ChannelPair(("v",), "o", row_of_column, D, linear=True)
    importance = 10 ** torch.rand(heads * D, generator=generator)
    order = pair_order(o.float(), importance, head_blocks(pair), 4, bits=1)
    moved = move_rows(v, producer_order(order, row_of_column, len(v)))
    assert not torch.equal(order, torch.arange(heads * D)) and not torch.equal(moved, v)
    assert torch.equal(order // D, torch.arange(heads * D) // D)  # every channel stays in its head
    torch.testing.assert_close(output(moved, move_columns(o, order)), output(v, o), rtol=0, atol=1e-12)


def test_rows_that_no_column_reads_stay() -> None:
    """Latent attention: a projection writes a head's keys beside its values."""
    row_of_column = torch.tensor([2, 3, 6, 7])
    assert producer_order(torch.tensor([1, 0, 2, 3]), row_of_column, 8).tolist() == [0, 1, 3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("group_size", [-1, 3, 8])
def test_blocks_that_groups_do_not_divide_stay(group_size: int) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(4)
    blocks = [(rows, [rows, rows + 4, rows + 8])]
    assert torch.equal(pair_order(weight, torch.rand(12), blocks, group_size, 2), torch.arange(12))


@pytest.mark.parametrize("bits", [2, 4])
def test_order_never_raises_the_clustering_error_and_spreads_important_columns(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 30, 128, generator=generator)
    importance = torch.ones(2, 128)
    importance[0, 32:64] = 100.0  # all important columns of matrix 0 in one group of the identity
    order = group_order(weight, importance, 32, bits)
    assert torch.equal(order.sort(-1).values, torch.arange(128).expand(2, 128))
    per_group = importance[0, order[0]].view(4, 32)
    assert bool(((per_group == 100).sum(-1) == 8).all())
    cost = importance.unsqueeze(-2).expand_as(weight)
    columns = order.unsqueeze(-2).expand(weight.shape)
    before = clustering_error(weight, cost, 4, bits)
    after = clustering_error(weight.gather(-1, columns), cost.gather(-1, columns), 4, bits)
    assert float(after[0]) < 0.7 * float(before[0]) and bool((after <= before).all())


def test_identity_where_nothing_can_be_gained():
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    identity = torch.arange(32).expand(2, 32)
    assert torch.equal(group_order(weight, torch.rand(2, 32), -1, 4), identity)  # one group
    constant = torch.ones(2, 8, 32)
    assert torch.equal(group_order(constant, torch.rand(2, 32), 8, 4), identity)  # no error to lower


def test_row_dependent_column_weights():
    """o read by several query heads: a column's cost differs from row to row."""
    weight = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
    by_row = importance.unsqueeze(-2).expand(1, 6, 16)
    assert torch.equal(group_order(weight, importance, 4, 2), group_order(weight, by_row, 4, 2))


def with_three_values(family: str) -> torch.nn.Module:
    """A random model whose linear maps hold -c, 0 and c only, and norms of the residual stream that have no gain: two
    bits with a codebook per group store it to the rounding of a step."""
    model = random_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "norm.weight")) and "self_attn" not in name:
                parameter.fill_(1.0)
            elif parameter.ndim >= 2 and ".layers." in name and not name.endswith("_bias"):
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(scale * parameter.div(scale).round().clamp(-1, 1))
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_a_permuted_output_folder_computes_what_the_source_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs with random orders: experts, shared experts, dense layers, heads, biases, fused checkpoints."""

    def random_order(weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        *stack, _, I = weight.shape
        return torch.rand(*stack, I, generator=torch.Generator().manual_seed(I)).argsort(-1)

    monkeypatch.setattr("codequant.permutation.group_order", random_order)
    monkeypatch.setattr(import_module("codequant.units.experts"), "group_order", random_order)
    monkeypatch.setattr("sources.random_model", with_three_values)
    source = write_source(family, tmp_path / "source")
    changes = ["weights.bits=2", "weights.group_size=4", "weights.correction=0", "rotation.method=none"]
    runs = {
        enabled: quantize(
            source,
            tmp_path / f"out-{enabled}",
            "w4a16",
            overrides=[*SMALL, *changes, f"permutation.enabled={enabled}"],
            calibration=tmp_path / "text.txt",
            workers=1,
        )
        for enabled in ("true", "false")
    }
    stored = {e: {k: v for f in run.glob("model-*") for k, v in load_file(f).items()} for e, run in runs.items()}
    moved = {k for k, v in stored["true"].items() if k.endswith("_packed") and not torch.equal(v, stored["false"][k])}
    for consumer, producer in (
        ("o_proj", "_a_proj" if family == "deepseek_v2" else "v_proj"),
        ("down_proj", "up_proj"),
    ):
        assert any(consumer in name for name in moved) and (
            family == "deepseek_v2" or any(producer in n for n in moved)
        )
    tokens = torch.arange(3, 60).view(1, -1)
    with torch.no_grad():
        logits = [
            codequant.load(folder, dtype=torch.float32)[0](tokens).logits for folder in (runs["true"], runs["false"])
        ]
        expected = with_three_values(family)(tokens).logits
    for got in logits:
        assert float((got - expected).norm() / expected.norm()) < 0.01  # steps are float16: 2**-11 per weight
