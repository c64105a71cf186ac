"""The benchmark checks before it measures, and its rows carry their provenance."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import quantize_rtn_checkpoint, random_model, write_source

from codequant import native
from codequant.bench import cpu, ggml, results
from codequant.bench.shapes import Shape, parse_shapes
from codequant.errors import InputError
from codequant.quantization_config import QuantizationConfig

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library was not built")


def test_rows_reach_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "128x128x4x2", "--tokens", "1,3", "--seconds", "0.01"]
    for _ in range(2):
        cpu.main([*arguments, "--json", str(tmp_path / "a.json"), "--results", str(tmp_path / "r" / "a.csv")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    names = {row["implementation"] for row in rows}
    assert {"codequant-a8", "codequant-a16", "torch-bf16", "torch-int4pack", "read"} <= names
    if ggml.library() is not None:
        assert {f"llama.cpp-{kind}" for kind in ggml.TYPES} <= names
    products = [row for row in rows if row["ratio_to"] == cpu.MICRO_KERNEL]
    linear = ["codequant-a8-linear", "codequant-a16-linear", "torch-bf16-linear"]
    assert [row["implementation"] for row in products] == [*linear, cpu.MICRO_KERNEL]
    assert all(row["tera_ops_per_s"] > 0 for row in products)
    layers = [row for row in rows if row not in products]
    assert {row["tokens"] for row in layers} == {1, 3} and all(row["gb_per_s"] > 0 for row in layers)
    assert all(row["p10_us"] <= row["median_us"] <= row["p90_us"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["implementation"] == cpu.BASELINE)
    with (tmp_path / "r" / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(rows) and tuple(lines[0]) == results.COLUMNS
    assert all(line["torch"] == torch.__version__ and line["isa"] for line in lines)
    ours = [line for line in lines if line["implementation"].startswith("codequant")]
    assert ours and all(line["isa"] in native.instruction_sets() for line in ours)
    assert "codequant-a8" in capsys.readouterr().out


def test_a_quantized_model_against_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model("mixtral")
    quantize_rtn_checkpoint(model, tmp_path / "quantized", QuantizationConfig())
    source = write_source(model, tmp_path / "source")
    threads = torch.get_num_threads()
    files = ["--json", str(tmp_path / "a.json"), "--results", str(tmp_path / "a.csv")]
    cpu.main(["--model", str(tmp_path / "quantized"), str(source), "--threads", "1", *files])
    assert torch.get_num_threads() == threads
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {(row["implementation"], row["shape"].split()[1]) for row in rows} == {
        *((name, phase) for name in ("codequant", cpu.BASELINE) for phase in ("prompt,", "decode,")),
        *((name, "loading") for name in ("codequant", cpu.FILE_READ)),
    }
    rates = [row for row in rows if "tokens_per_s" in row]
    assert all(abs(row["tokens_per_s"] * row["median_us"] / 1e6 - 1) < 0.01 for row in rates)
    text = capsys.readouterr().out
    assert "tokens/s" in text and "GB/s" in text and all(str(row["tokens_per_s"]) in text for row in rates)


def test_a_wrong_output_is_never_timed() -> None:
    one = cpu.implementations(Shape(128, 128, 4, 2), 3)[0]
    x, index, weights = torch.randn(3, 128).bfloat16(), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    cpu._check(one, x, index, weights)
    for factor in (1.1, torch.nan):
        wrong = replace(one, forward=lambda *a, factor=factor: one.forward(*a) * factor)
        with pytest.raises(RuntimeError, match="codequant-a8: relative error"):
            cpu._check(wrong, x, index, weights)


def test_shapes() -> None:
    shapes = parse_shapes("mixtral,64x32x4x2")
    assert shapes["mixtral"].experts == 8 and shapes["64x32x4x2"] == Shape(64, 32, 4, 2)
    with pytest.raises(InputError, match="'64x32x4'"):
        parse_shapes("mixtral,64x32x4")
