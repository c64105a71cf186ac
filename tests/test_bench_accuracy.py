"""The accuracy benchmark: recipes of the methods, rows of the contract, input errors."""

import json
from pathlib import Path

import pytest
from sources import SMALL, write_source

from codequant.bench import accuracy
from codequant.errors import InputError

KEYS = {
    *("method", "coverage", "weight_bits", "activation_bits", "kl", "perplexity", "router_change", "bits_per_weight"),
    "seconds",
}


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_every_method(where: str, tmp_path: Path) -> None:
    source = write_source("olmoe", tmp_path / "source")
    text = str(tmp_path / "text.txt")
    overrides = [part for change in (*SMALL, "calibration.windows=24") for part in ("--set", change)]
    accuracy.main(
        [
            *("--model", str(source), "--calibration", text, "--text", text, "--grid", "full-a8w2"),
            *("--windows", "8", "--length", "32", "--workers", "1", "--json", str(tmp_path / "rows.json"), *overrides),
            *("--device", where),
        ]
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(accuracy.METHODS) and all(row.keys() >= KEYS for row in rows)
    kl = {row["method"]: row["kl"] for row in rows}
    assert len({row["bits_per_weight"] for row in rows}) == 1  # equal bits
    assert 0 < kl["codequant"] < kl["rtn"]


def test_methods_differ_only_where_they_should() -> None:
    point = accuracy.Point.parse("paper-a4w4")
    recipes = {method: accuracy.recipe(method, point) for method in accuracy.METHODS}
    for chosen in recipes.values():
        assert (chosen.weights.bits, chosen.weights.group_size, chosen.activations.bits) == (4, -1, 4)
        assert chosen.weights.coverage == "normed-inputs" and chosen.weights.router and not chosen.activations.hadamard
        assert chosen.calibration == recipes["codequant"].calibration
    assert recipes["published"].rotation.start == "random" and recipes["published"].activations.clip == 1
    assert recipes["kmeans"].rotation.method == recipes["rtn"].rotation.method == "none"
    full = accuracy.recipe("published", accuracy.Point.parse("full-a4w4"))
    assert full.activations.hadamard and full.rotation.heads and full.weights.coverage == "all"


@pytest.mark.parametrize("name", ["half-a4w4", "paper-a5w4", "full-a4w8", "full"])
def test_grid_errors_name_the_point(name: str) -> None:
    with pytest.raises(InputError, match=name):
        accuracy.Point.parse(name)
