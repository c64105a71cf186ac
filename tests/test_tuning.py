"""Fine-tuning inside whole runs: deterministic, reported, and never kept against the held-out windows."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sources import SMALL, write_source

from codequant.errors import InputError
from codequant.pipeline import quantize

ROUGH = [
    "weights.bits=2",
    "weights.method=kmeans",
    "weights.min_expert_tokens=1",
    "calibration.windows=24",
]  # room to gain
TUNED = [*ROUGH, "finetuning.epochs=4", "finetuning.learning_rate=0.02", "calibration.windows_per_unit=6"]


@pytest.mark.parametrize(
    ("family", "recipe"), [("qwen2_moe", "w4a4-full"), ("gpt_oss", "paper"), ("deepseek_v2", "w4a8")]
)
def test_finetuning_moves_centroids_only_and_only_where_it_helps(family: str, recipe: str, tmp_path: Path) -> None:
    source = write_source(family, tmp_path / "source")
    folders = [
        quantize(
            source, tmp_path / name, recipe, overrides=[*SMALL, *extra], calibration=tmp_path / "text.txt", workers=n
        )
        for name, extra, n in (("a", TUNED, 1), ("b", TUNED, 2), ("plain", ROUGH, 1))
    ]
    tuned, again, plain = ({k: v for f in sorted(d.glob("model-*")) for k, v in load_file(f).items()} for d in folders)
    assert all(tuned[name].equal(again[name]) for name in tuned)
    first = {name for name in plain if ".layers.0." in name and "experts" not in name}
    moved = {name for name in first if not plain[name].equal(tuned[name])}
    report = json.loads((folders[0] / "codequant.json").read_text())["layers"]
    results = [r for layer in report.values() for r in layer["finetuning"].values()]
    assert {r["after"] < r["before"] for r in results if r["kept"]} == {True}  # so some are
    assert all(r["after"] == r["before"] for r in results if not r["kept"])
    assert bool(moved) == report["0"]["finetuning"]["dense"]["kept"]
    assert "finetuning" not in json.loads((folders[2] / "codequant.json").read_text())["layers"]["0"]


def test_a_single_unit_of_windows_has_none_to_hold_out(tmp_path: Path) -> None:
    source = write_source("olmoe", tmp_path / "source")
    with pytest.raises(InputError, match=r"finetuning\.epochs: 4"):
        quantize(
            source,
            tmp_path / "out",
            overrides=[*SMALL, *TUNED, "calibration.windows=6"],
            calibration=tmp_path / "text.txt",
        )
    assert not (tmp_path / "out").exists()
