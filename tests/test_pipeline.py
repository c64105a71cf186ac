"""Whole runs on random models of every family: quantize, load, generate; same bytes twice; bad input in one line."""

from pathlib import Path

import pytest
import torch
from helpers import FAMILIES
from sources import SMALL, write_source
from transformers import AutoModelForCausalLM

import codequant
from codequant.errors import InputError
from codequant.inspection import inspect_folder
from codequant.pipeline import quantize
from codequant.verification import check_tensors


def files(folder: Path) -> dict[str, bytes]:
    """Everything in an output folder but the measured times and the page that shows them."""
    measured = ("timings.json", "report.html")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in measured}


def divergence(source: Path, out: Path) -> float:
    """Mean KL from the source's next-token distributions to the quantized model's; a wrong basis gives 2 and more."""
    model, tokenizer = codequant.load(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = tokenizer("The fox of document", return_tensors="pt").input_ids
    with torch.no_grad():
        got, expected = model(tokens).logits.log_softmax(-1), reference(tokens).logits.log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_load_generate(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    out = quantize(source, tmp_path / "out", "w4a16", overrides=SMALL, calibration=tmp_path / "text.txt")
    check_tensors(out)
    assert divergence(source, out) < 0.2  # 4 bits on matrices 20 to 56 wide
    model, tokenizer = codequant.load(out, dtype=torch.float32)
    tokens = tokenizer("The fox of document", return_tensors="pt").input_ids
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, tokens.shape[1] + 3)
    assert not (tmp_path / "out.codequant-work").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides", "limit"),
    [
        ("paper", [], 0.15),
        ("w4a4-full", [], 0.15),
        ("w3a8", [], 0.1),
        ("w2a8", [], 0.35),
        ("w3a8", ["weights.group_size=8", "rotation.heads=false"], 0.01),
        ("w4a8", ["weights.method=rtn", "rotation.method=none"], 0.11),
        ("w4a8", ["weights.target_bits=3.2"], 0.2),
    ],
)
def test_recipes(recipe: str, overrides: list[str], limit: float, tmp_path: Path) -> None:
    source = write_source("qwen3_moe", tmp_path / "source")
    out = quantize(source, tmp_path / "out", recipe, overrides=SMALL + overrides, calibration=tmp_path / "text.txt")
    assert divergence(source, out) < limit  # about four times what was measured


@pytest.mark.parametrize(("family", "target"), [("qwen3_moe", 3.1), ("qwen3_moe", 3.6), ("gpt_oss", 3.6)])
def test_bits_are_given_out_up_to_the_target(family: str, target: float, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    options = [*SMALL, f"weights.target_bits={target}"]
    out = quantize(source, tmp_path / "out", overrides=options, calibration=tmp_path / "text.txt")
    kinds = [kind for kind in inspect_folder(out).kinds if kind.scheme is not None]
    weights = sum(kind.parameters for kind in kinds)
    average = sum(kind.parameters * kind.scheme.bits for kind in kinds) / weights
    largest = max(kind.parameters / kind.count for kind in kinds)  # what one more bit would have cost
    assert target - 2 * 2 * largest / weights < average <= target
    assert {kind.scheme.bits for kind in kinds if "experts" not in kind.name} == {4}
    check_tensors(out)
    assert divergence(source, out) < 0.4
    assert "bits given out" in (out / "report.html").read_text()


def test_a_target_out_of_reach_is_refused(tmp_path: Path) -> None:
    source = write_source("qwen3_moe", tmp_path / "source")
    with pytest.raises(InputError, match=r"weights.target_bits: 2.0, expected 2.98 to 4.00"):
        quantize(
            source, tmp_path / "out", overrides=[*SMALL, "weights.target_bits=2"], calibration=tmp_path / "text.txt"
        )


def test_same_input_gives_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    source = write_source("qwen2_moe", tmp_path / "source")
    outs = [
        quantize(source, tmp_path / f"out{n}", overrides=SMALL, calibration=tmp_path / "text.txt", workers=n)
        for n in (1, 3)
    ]
    assert files(outs[0]) == files(outs[1])
