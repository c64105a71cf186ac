"""Whole runs on random models of every family: quantize, load, generate; same bytes twice; bad input in one line."""

from pathlib import Path

import pytest
import torch
from helpers import FAMILIES
from sources import SMALL, write_source
from transformers import AutoModelForCausalLM

import codequant
from codequant.pipeline import quantize
from codequant.verification import check_tensors


def files(folder: Path) -> dict[str, bytes]:
    """Everything in an output folder but the measured times and the page that shows them."""
    measured = ("timings.json", "report.html")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in measured}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_load_generate(family: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    out = quantize(source, tmp_path / "out", "w4a16", overrides=SMALL, calibration=tmp_path / "text.txt")
    check_tensors(out)
    assert (out / "report.html").is_file()  # a run outlives a report that fails, this test does not
    model, tokenizer = codequant.load(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = tokenizer("The fox of document", return_tensors="pt").input_ids
    with torch.no_grad():
        got, expected = model(tokens).logits.log_softmax(-1), reference(tokens).logits.log_softmax(-1)
    divergence = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence < 0.2, divergence  # 4 bits on matrices 20 to 56 wide; a wrong basis gives 2 and more
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, tokens.shape[1] + 3)
    assert not (tmp_path / "out.codequant-work").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        *(("paper", []), ("w4a4-full", []), ("w3a8", []), ("w2a8", [])),
        ("w3a8", ["weights.group_size=8", "rotation.heads=false"]),
        ("w4a8", ["weights.method=rtn", "rotation.method=none"]),
    ],
)
def test_recipes(recipe: str, overrides: list[str], tmp_path: Path) -> None:
    source = write_source("qwen3_moe", tmp_path / "source")
    out = quantize(source, tmp_path / "out", recipe, overrides=SMALL + overrides, calibration=tmp_path / "text.txt")
    model, tokenizer = codequant.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(tokenizer("ant", return_tensors="pt").input_ids).logits).all()


def test_same_input_gives_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    source = write_source("qwen2_moe", tmp_path / "source")
    outs = [
        quantize(source, tmp_path / f"out{n}", overrides=SMALL, calibration=tmp_path / "text.txt", workers=n)
        for n in (1, 3)
    ]
    assert files(outs[0]) == files(outs[1])
