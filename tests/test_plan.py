"""What `plan` predicts, against what runs then need."""

import json
from pathlib import Path

import pytest
import scale_runs
import torch
from helpers import random_model, write_source

from codequant.bench.scale import measure, synthetic_config, write_checkpoint
from codequant.executor import Unit
from codequant.pipeline import quantize
from codequant.plan import Plan, Rates, Work, plan, simulate
from codequant.recipe import load_recipe
from codequant.source import SourceModel
from codequant.store import Store
from codequant.units import Context, graph

SETTINGS = [
    "calibration.windows=8",
    "calibration.length=64",
    "calibration.windows_per_unit=2",
    "rotation.steps=2",
    "weights.method=kmeans",
]
RATES = Rates(1e11, 5e9, {2048: (1.0, 2e-3)})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = synthetic_config("small", 2)
    config.num_experts = 8
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "source", config)


def planned(source: Path, workers: int) -> Plan:
    recipe = load_recipe("w4a8", SETTINGS)
    return plan(Context(SourceModel(source), recipe, Store(Path())), workers, RATES)


def test_a_simulated_run_waits_shares_and_releases() -> None:
    """a and b side by side, then c alone, which needs both; a's and b's results go when c is done."""
    units = [Unit("a", "f"), Unit("b", "f"), Unit("c", "f", needs=("a", "b"), keep=True)]
    works = {"a": Work(memory=5, result=10), "b": Work(memory=7, result=20), "c": Work(memory=8, result=1)}
    seconds = {"a": 3.0, "b": 2.0, "c": 1.0}
    assert simulate(units, works, seconds, 2) == (4.0, 12, 31)
    assert simulate(units, works, seconds, 1) == (6.0, 8, 31)


def test_wider_matrices_than_were_measured_cost_the_square_and_the_cube() -> None:
    rates = Rates(1.0, 1.0, {4: (1.0, 0.5), 8: (3.0, 2.0)})
    assert rates.quantizing(8, 2, 3) == 2 * 3.0 + 3 * 2.0
    assert rates.quantizing(16, 2, 3) == 2 * 3.0 * 8 + 3 * 2.0 * 4


def test_workers_share_what_a_gpu_computes_and_nothing_else() -> None:
    work = Work(products=10, read=4, result=3, calls=2)
    rates = Rates(5.0, 1.0, {}, read=2.0, write=1.0)
    assert work.seconds(rates, 3) - work.seconds(rates, 1) == pytest.approx(2 * 10 / 5)
    on_cpu = Rates(5.0, 1.0, {})
    assert work.seconds(rates) - work.seconds(on_cpu) == pytest.approx(4 / 2 + 3 / 1)


def test_disk_at_its_fullest_and_output(source: Path, tmp_path: Path) -> None:
    """What lies in the work folder after every unit, against the prediction."""
    out = tmp_path / "out"
    work = out.with_name("out.codequant-work")
    fullest = 0

    def watch(progress: object) -> None:
        nonlocal fullest
        fullest = max(fullest, sum(path.stat().st_size for path in (work / "units").iterdir()))

    found = planned(source, 1)
    quantize(source, out, overrides=SETTINGS, workers=1, listen=watch)
    assert found.disk_bytes == pytest.approx(fullest, rel=0.25)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found.output_bytes == pytest.approx(written, rel=0.25)


def test_planning_reads_no_weights(source: Path, tmp_path: Path) -> None:
    """A source whose weights are holes in its files plans like the real one."""
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            with (hollow / path.name).open("wb") as file:
                file.write(header)
                file.truncate(len(data))
        else:
            (hollow / path.name).write_bytes(data)
    assert planned(hollow, 2) == planned(source, 2)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    rows = []
    for layers in (2, 6):
        folder = write_checkpoint(tmp_path / f"source-{layers}", synthetic_config("small", layers))
        rows.append(measure(source=folder, out=tmp_path / f"out-{layers}", workers=1, overrides=SETTINGS))
    few, many = rows
    assert many["peak_bytes"] < 1.1 * few["peak_bytes"]


def test_layers_wait_for_no_other_layer_when_calibrated_on_the_source(source: Path) -> None:
    """The quantized units of a layer need the teacher, the rotation and their own layer only."""
    recipe = load_recipe("w4a8", [*SETTINGS, "weights.inputs=source"])
    units = graph(Context(SourceModel(source), recipe, Store(Path())))
    assert not any(unit.function in ("enter", "student") for unit in units)
    by_key = {unit.key: unit for unit in units}
    for unit in units:
        for need in (by_key[key] for key in unit.needs):
            if unit.function in ("dense", "route", "experts", "layer") and need.function != "teacher":
                own = need.function == "rotation" or need.arguments.get("layer") == unit.arguments["layer"]
                assert own or need.function == "embed"


def test_a_model_calibrated_on_the_source_is_the_same_for_any_workers(tmp_path: Path) -> None:
    folder = write_source(random_model("qwen3_moe", dtype=torch.bfloat16), tmp_path / "source")
    text = scale_runs.write_text(tmp_path / "text.txt")
    outs = [
        quantize(
            folder,
            tmp_path / f"out-{workers}",
            calibration=text,
            overrides=[*scale_runs.OVERRIDES, "weights.inputs=source"],
            workers=workers,
        )
        for workers in (1, 3)
    ]
    first, second = map(scale_runs.fingerprint, outs)
    assert first == second
    layers = json.loads((outs[0] / "codequant.json").read_text())["layers"]
    assert all(0 < error < 0.2 for layer in layers.values() for error in layer["errors"].values())
