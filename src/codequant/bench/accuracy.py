"""Accuracy at equal bits and coverage: published and simple methods against this one, on the same tokens.

Every method is a recipe of the same pipeline:

    rtn              no rotation, equally spaced entries
    kmeans           no rotation, unweighted clusters
    published        a rotation learned from a random start by mean squared activation error, unweighted clusters: what
                     the public code of arXiv 2604.10496 does, whose fine-tuning stays below the resolution of bf16
    published-tuned  the same with fine-tuning that works: centroids trained on attention, MoE and router losses by this
                     pipeline's stage; asked for by --methods
    codequant        the default recipe, with the activation clipping of the 4-bit ones

Coverage `paper` quantizes q, k, v, gate, up and the router, and their inputs; `full` every linear map but the router.
For full coverage `published` gets value heads rotated and the online Hadamard transform too, so that the comparison is
hard.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import codequant
from codequant import calibration, evaluation
from codequant.data import DEMO_HELDOUT, DEMO_MODEL
from codequant.errors import InputError
from codequant.inspection import inspect_folder
from codequant.pipeline import check_device, load_tokenizer, quantize
from codequant.recipe import Recipe, load_recipe
from codequant.source import resolve

METHODS = ("rtn", "kmeans", "published", "codequant")
GRID = "paper-a4w4,paper-a8w4,paper-a8w3,full-a8w4,full-a4w4"
PLAIN = ["rotation.method=none", "weights.correction=0"]
PUBLISHED = ["rotation.start=random", "rotation.loss=squared-error", "weights.method=kmeans", "weights.correction=0"]
CHANGES = {
    "rtn": [*PLAIN, "weights.method=rtn"],
    "kmeans": [*PLAIN, "weights.method=kmeans"],
    "published": PUBLISHED,
    "published-tuned": [*PUBLISHED, "finetuning.epochs=4"],
    "codequant": [],
}


@dataclass(frozen=True)
class Point:
    """One column of the comparison."""

    coverage: str
    activation_bits: int
    weight_bits: int

    @classmethod
    def parse(cls, text: str) -> "Point":
        """`paper-a4w4`. Raises InputError."""
        coverage, _, bits = text.strip().partition("-")
        activation, _, weight = bits.removeprefix("a").partition("w")
        if coverage not in ("paper", "full") or activation not in ("4", "8", "16") or weight not in ("2", "3", "4"):
            raise InputError(f"--grid: {text!r}, expected paper or full, then bits, as in paper-a4w4 or full-a16w3")
        return cls(coverage, int(activation), int(weight))


def recipe(method: str, point: Point, extra: Sequence[str] = ()) -> Recipe:
    """What a method does at a point; `extra` overrides apply to every method."""
    smooths = method not in ("rtn", "kmeans")
    changes = [
        f"weights.bits={point.weight_bits}",
        f"activations.bits={point.activation_bits}",
        f"weights.coverage={'normed-inputs' if point.coverage == 'paper' else 'all'}",
        f"weights.router={point.coverage == 'paper'}",
        f"rotation.heads={smooths and point.coverage == 'full'}",
        f"activations.hadamard={smooths and point.coverage == 'full'}",
    ]
    if method == "codequant" and point.activation_bits == 4:
        changes += ["activations.clip=0.9", "activations.inner_clip=0.8"]
    return load_recipe("w4a8", [*changes, *CHANGES[method], *extra])


def run(
    model: str | Path = DEMO_MODEL,
    calibration_text: str | Path | None = None,
    text: str | Path = DEMO_HELDOUT,
    grid: Sequence[str] = tuple(GRID.split(",")),
    methods: Sequence[str] = METHODS,
    windows: int = 32,
    length: int = 512,
    extra: Sequence[str] = (),
    workers: int | None = None,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows of every method at every point, scored on `windows` windows of `text`; `report` gets each as it is done."""
    check_device(device)
    points = [Point.parse(name) for name in grid]
    if unknown := set(methods) - set(CHANGES):
        raise InputError(f"--methods: {sorted(unknown)[0]!r}, expected some of {', '.join(CHANGES)}")
    source = resolve(model)
    tokenizer = load_tokenizer(source)
    reference = evaluation.load_reference(source, device)
    tokens = calibration.windows(
        calibration.read_documents(text), tokenizer, windows, evaluation.context_length(reference, length), seed=1
    )
    rows = []
    for row in _rows(source, reference, tokens, calibration_text, points, methods, extra, workers, device):
        report(row)
        rows.append(row)
    return rows


def _rows(
    source: Path,
    reference: PreTrainedModel,
    tokens: Tensor,
    calibration_text: str | Path | None,
    points: Sequence[Point],
    methods: Sequence[str],
    extra: Sequence[str],
    workers: int | None,
    device: str,
) -> Iterator[dict[str, Any]]:
    for point in points:
        for method in methods:
            with tempfile.TemporaryDirectory(prefix="codequant-") as folder:
                start = time.perf_counter()
                out = quantize(
                    source,
                    Path(folder) / "out",
                    recipe(method, point, extra),
                    calibration=calibration_text,
                    workers=workers,
                    device=device,
                )
                seconds = time.perf_counter() - start
                model, _ = codequant.load(out, dtype=torch.float32, device=device)
                found = evaluation.evaluate(model, tokens, reference, None, inspect_folder(out).bits_per_weight)
            yield {
                "method": method,
                "coverage": point.coverage,
                "weight_bits": point.weight_bits,
                "activation_bits": point.activation_bits,
                "kl": found.kl,
                "perplexity": found.perplexity,
                "reference_perplexity": found.reference_perplexity,
                "router_change": found.router_change,
                "bits_per_weight": found.bits_per_weight,
                "seconds": round(seconds, 1),
                "tokens": found.tokens,
                "device": device,
            }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """KL of every row, and by how much the published method's is larger."""
    published = {_point(r): r["kl"] for r in rows if r["method"] == "published"}
    found = Table(box=None, pad_edge=False)
    for name in (
        "coverage",
        "bits",
        "method",
        "KL",
        "perplexity",
        "router change",
        "bits/weight",
        "s",
        "published / KL",
    ):
        found.add_column(name, justify="left" if name in ("coverage", "bits", "method") else "right")
    for row in rows:
        base = published.get(_point(row))
        change = row["router_change"]
        found.add_row(
            row["coverage"],
            f"A{row['activation_bits']}W{row['weight_bits']}",
            row["method"],
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{change:.1%}" if change is not None else "",
            f"{row['bits_per_weight']:.2f}",
            f"{row['seconds']:.0f}",
            f"{base / row['kl']:.2f}" if base else "",
        )
    return found


def _point(row: dict[str, Any]) -> tuple:
    return row["coverage"], row["activation_bits"], row["weight_bits"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="codequant bench accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or hub id; default: the bundled model")
    parser.add_argument("--calibration", help="text to calibrate on; default: bundled")
    parser.add_argument("--text", default=str(DEMO_HELDOUT), help="text to score; default: bundled held-out text")
    parser.add_argument("--grid", default=GRID, help="points, comma-separated: paper or full, then bits")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--windows", type=int, default=32, help="windows of text to score")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe fields of every method")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N], to quantize and to score")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args(arguments)

    def report(row: dict[str, Any]) -> None:
        point = f"{row['coverage']} A{row['activation_bits']}W{row['weight_bits']}"
        sys.stderr.write(f"{point} {row['method']}: KL {row['kl']:.4f}, {row['seconds']:.0f} s\n")

    rows = run(
        a.model,
        a.calibration,
        a.text,
        a.grid.split(","),
        a.methods.split(","),
        a.windows,
        a.length,
        a.set,
        a.workers,
        a.device,
        report,
    )
    if a.json:
        a.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
