"""report.html: what a run did to a model, as one self-contained page. Nothing in it is computed from the model again.

The numbers come from the output folder: codequant.json (errors, tokens per expert), timings.json, rotation.safetensors
(sampled activations) and the codebooks themselves, and, where one is at hand, from an evaluation (`evaluate --json`).
"""

import base64
import json
import math
import re
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal
from safetensors import safe_open
from torch import Tensor

from codequant.errors import InputError
from codequant.inspection import Inspection, inspect_folder
from codequant.packing import SUFFIXES, PackedWeight, unpack_indices
from codequant.report import charts
from codequant.stages import STAGES
from codequant.verification import weight_files

REPORT = "report.html"
SOURCE_BITS = 16
WORST = 10  # matrices listed by name
# Of a quantized matrix in codequant.json: its layer, and where it belongs to an expert its number, before or after the
# matrix's name (checkpoints with one tensor for all experts have none of their own).
_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(?:(?P<first>\d+)\.(?P<kind>\w+)|(?P<fused>\w+)\.(?P<last>\d+))$")


def write_report(folder: str | Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Write report.html into an output folder, anew where it exists, and return its path.

    evaluation: what `evaluate --json` wrote. Raises InputError where the folder is none of codequant's or carries no
    codequant.json.
    """
    folder = Path(folder)
    inspection = inspect_folder(folder)
    if not inspection.provenance.get("layers"):
        raise InputError(f"{folder}: no codequant.json with layers, expected a folder written by `codequant quantize`")
    path = folder / REPORT
    path.write_text(render(folder, inspection, evaluation), encoding="utf-8")
    return path


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote. Raises InputError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and {"perplexity", "tokens", "layers"} <= found.keys():
            return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}, expected what `evaluate --json` wrote") from error
    raise InputError(f"{path}: no evaluation, expected what `evaluate --json` wrote")


def render(folder: Path, inspection: Inspection, evaluation: dict[str, Any] | None) -> str:
    provenance = inspection.provenance
    layers = [provenance["layers"][key] for key in sorted(provenance["layers"], key=int)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__name__) / "template.html").read_text(encoding="utf-8"))
    return template.render(
        name=provenance["source"]["name"],
        recipe=provenance["recipe"]["name"],
        provenance=provenance,
        inspection=inspection,
        source_bytes=inspection.parameters * SOURCE_BITS // 8,
        decimal=decimal,
        evaluation=evaluation,
        tiles=tiles(inspection, evaluation),
        sections={
            "activations": activations(folder, provenance.get("rotation")),
            "layers": layer_errors(layers, evaluation),
            "experts": expert_errors(layers),
            "router": router(evaluation),
            "load": load(layers),
            "weights": weights(folder, inspection),
        },
        worst=worst_matrices(layers),
        starved={i: layer["starved"] for i, layer in enumerate(layers) if layer["starved"]},
        proof=max(layer["proof"] for layer in layers),
        stages=stages(folder),
        tasks=(evaluation or {}).get("tasks") or {},
        percent=charts.percent,
    )


Tile = tuple[str, str, str]  # what, number, remark
Chart = tuple[str, Markup]  # caption, drawing


def tiles(inspection: Inspection, evaluation: dict[str, Any] | None) -> list[Tile]:
    source = inspection.parameters * SOURCE_BITS / 8
    found = [
        ("bits per weight", f"{inspection.bits_per_weight:.2f}", "all parameters counted"),
        ("size", decimal(inspection.bytes), f"{source / inspection.bytes:.1f}x smaller than in {SOURCE_BITS} bits"),
    ]
    if not math.isnan(inspection.bits_per_quantized_weight):
        quantized = sum(kind.parameters for kind in inspection.kinds if kind.scheme is not None)
        share = f"{quantized / inspection.parameters:.0%} of {charts.plain(inspection.parameters)} parameters"
        found.insert(1, ("bits where quantized", f"{inspection.bits_per_quantized_weight:.2f}", share))
    if (allocation := inspection.provenance.get("allocation")) is not None:
        total = sum(allocation["weights"].values())
        shares = ", ".join(f"{weights / total:.0%} at {bits}" for bits, weights in allocation["weights"].items())
        found.append(("bits given out", f"{allocation['average']:.2f}", f"of experts' weights, {shares} bits"))
    if evaluation is not None:
        perplexity, reference = evaluation["perplexity"], evaluation.get("reference_perplexity")
        change = "" if reference is None else f"{perplexity / reference - 1:+.2%} against {reference:.3f}"
        found.append(("perplexity", f"{perplexity:.3f}", change or f"{evaluation['tokens']:,} tokens"))
        if evaluation.get("kl") is not None:
            found.append(("KL divergence", f"{evaluation['kl']:.4f}", "nats per token, from the source"))
        if evaluation.get("router_change") is not None:
            found.append(
                ("router change", f"{evaluation['router_change']:.1%}", "tokens sent to another set of experts")
            )
    return found


# --- activations -----------------------------------------------------------------------------------------------------


def activations(folder: Path, rotation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Charts of the ranges, and the sampled activations of some sites for the surfaces; the widest is shown first."""
    path = folder / "rotation.safetensors"
    if not rotation or "sites" not in rotation or not path.is_file():
        return None
    sites, chosen = rotation["sites"], rotation["surfaces"]
    with safe_open(path, "pt") as file:
        before, after = file.get_tensor("activations"), file.get_tensor("activations.rotated")  # [S, T, C]
    names = [f"layer {sites[i]['layer']}, {sites[i]['norm']}" for i in chosen]
    first = max(range(len(chosen)), key=lambda k: sites[chosen[k]]["range"])
    ranges = charts.lines(
        {"before": [site["range"] for site in sites], "after": [site["range_rotated"] for site in sites]},
        "layer" + ", norm by norm" * (len({site["norm"] for site in sites}) > 1),
        "max - min of a token",
        charts.plain,
        [str(site["layer"]) for site in sites],
    )
    peaks = charts.lines(
        {
            name: x[first].float().amax(0).sort(descending=True).values.tolist()
            for name, x in (("before", before), ("after", after))
        },
        "channels, sorted",
        "largest |activation|",
        charts.plain,
        dots=False,
    )
    return {
        "charts": [
            ("Range of a token in every site", ranges),
            (f"Largest activation of each channel, {names[first]}", peaks),
        ],
        "surfaces": [{"name": name, **encode(before[k], after[k])} for k, name in enumerate(names)],
        "first": first,
        "shape": {"tokens": before.shape[1], "channels": before.shape[2]},
        "gain": math.sqrt(rotation["range_loss_unrotated"] / rotation["range_loss"]),
    }


def encode(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Two surfaces [T, C] on one scale of 256 levels, which is more than a screen shows."""
    peak = float(max(before.max(), after.max())) or 1.0

    def code(surface: Tensor) -> str:
        levels = (surface.float() / peak * 255).round().to(torch.uint8)
        return base64.b64encode(levels.numpy().tobytes()).decode()

    return {"peak": float(f"{peak:.4g}"), "before": code(before), "after": code(after)}


# --- errors ----------------------------------------------------------------------------------------------------------


def kind_of(module: str) -> tuple[str, int | None]:
    """(matrix, expert): `model.layers.3.mlp.experts.7.up_proj` -> ("experts up_proj", 7); ("o_proj", None)."""
    if (match := _EXPERT.search(module)) is None:
        return module[match.end() :] if (match := _LAYER.search(module)) else module, None
    kind, expert = match["kind"] or match["fused"], match["first"] or match["last"]
    return f"experts {kind}", int(expert)


def errors_by_kind(layers: list[dict[str, Any]]) -> dict[str, list[dict[int | None, float]]]:
    """{kind: [layer][expert] -> relative output error}. Matrices that share inputs are quantized as one and have one
    error: they are one kind, with all their names."""
    found: dict[str, list[dict[int | None, float]]] = defaultdict(lambda: [{} for _ in layers])
    for number, layer in enumerate(layers):
        for module, squared in layer["errors"].items():
            kind, expert = kind_of(module)
            found[kind][number][expert] = math.sqrt(squared)
    merged: list[tuple[list[str], list[dict[int | None, float]]]] = []
    for kind, values in sorted(found.items()):
        same = next((names for names, others in merged if others == values), None)
        if same is None:
            merged.append(([kind], values))
        else:
            same.append(kind.rpartition(" ")[2].rpartition(".")[2])
    return {", ".join(names).removeprefix("self_attn."): values for names, values in merged}


def layer_errors(layers: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> list[Chart]:
    found = []
    stream: dict[str, list[float | None]] = {}
    drift = [sum(d) / len(d) if (d := layer.get("differences")) else None for layer in layers]
    if any(value is not None for value in drift):
        stream["calibration text"] = drift
    if evaluation and evaluation.get("layers"):
        measured = {layer["layer"]: layer["error"] for layer in evaluation["layers"]}
        stream["evaluation text"] = [measured.get(i) for i in range(len(layers))]
    if stream:
        drawn = charts.lines(stream, "layer", "relative distance", charts.percent)
        found.append(("Distance of the residual stream from the source's, after each layer", drawn))
    matrices = {
        kind: [sum(by.values()) / len(by) if by else None for by in values]
        for kind, values in errors_by_kind(layers).items()
    }
    if matrices:
        drawn = charts.lines(matrices, "layer", "relative error of the output", charts.percent)
        found.append(("Output error of each matrix on its calibration inputs, mean over experts", drawn))
    return found


def expert_errors(layers: list[dict[str, Any]]) -> list[Chart]:
    found = []
    for kind, values in errors_by_kind(layers).items():
        if not kind.startswith("experts "):
            continue
        experts = 1 + max(e for by in values for e in by if e is not None)
        rows = [[by.get(e) for e in range(experts)] for by in values]
        found.append((kind.removeprefix("experts "), charts.heat_map(rows, "expert", "layer", charts.percent)))
    return found


def worst_matrices(layers: list[dict[str, Any]]) -> list[tuple[str, float, int | None]]:
    """(module, relative output error, tokens of its expert) of the WORST."""
    errors = [(math.sqrt(squared), module, layer) for layer in layers for module, squared in layer["errors"].items()]
    errors.sort(key=lambda entry: (-entry[0], entry[1]))
    return [(module, error, layer["tokens"].get(str(kind_of(module)[1]))) for error, module, layer in errors[:WORST]]


# --- routing ---------------------------------------------------------------------------------------------------------


def router(evaluation: dict[str, Any] | None) -> Markup | None:
    measured = {layer["layer"]: layer["router_change"] for layer in (evaluation or {}).get("layers", ())}
    if all(change is None for change in measured.values()):
        return None
    changes = [measured.get(i) for i in range(max(measured) + 1)]
    return charts.bars(changes, "layer", "tokens routed otherwise", charts.percent)


def load(layers: list[dict[str, Any]]) -> Markup | None:
    """Tokens of each expert as a multiple of an even share."""
    rows: list[list[float | None]] = []
    for layer in layers:
        tokens = layer["tokens"]
        even = sum(tokens.values()) / max(1, len(tokens))
        rows.append([tokens[str(e)] / max(even, 1e-9) for e in range(len(tokens))])
    if not any(rows):
        return None
    return charts.heat_map(rows, "expert", "layer", lambda v: f"{v:.2g}x")


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(folder: Path, inspection: Inspection) -> list[Chart]:
    """Densities of the first expert's matrices (else of dense ones) in the first and last layer that has them."""
    quantized = [kind for kind in inspection.kinds if kind.scheme is not None]
    chosen = [kind for kind in quantized if ".experts" in kind.name] or quantized
    found = []
    for kind in [chosen[0], *chosen[-1:]] if len(chosen) > 1 else chosen:
        for layer in dict.fromkeys((kind.layers[0], kind.layers[-1])):
            module = kind.name.replace("*", str(layer), 1).replace("*", "0")
            x, heights, levels = weight_density(read_packed(folder, module, kind.shape[-1]))
            found.append((module, charts.density(x, heights, levels, "weight / rms of its row")))
    return found


def read_packed(folder: Path, module: str, in_features: int) -> PackedWeight:
    """A matrix by checkpoint module; the first of a stack."""
    parts: dict[str, Tensor] = {}
    names = {f"{module}{dot}_{suffix}": suffix for dot in (".weight", "") for suffix in SUFFIXES}
    for file in weight_files(folder):
        with safe_open(file, "pt") as shard:
            for name in names.keys() & set(shard.keys()):
                parts[names[name]] = shard.get_tensor(name)
    packed, codebook, step = (parts[s] if parts[s].dim() == d else parts[s][0] for s, d in zip(SUFFIXES, (2, 3, 2)))
    return PackedWeight(packed, codebook, step, in_features)


def weight_density(weight: PackedWeight, bins: int = 161) -> tuple[list[float], list[float], list[float]]:
    """(x, density at x, mean level of each rank) of the weights behind the codes, rows scaled to unit rms.

    The source's weights are not in the folder, but how many of them chose each level is: over the width of the level's
    cell (halfway to its neighbours) that is their density, averaged here over all rows. R rows and groups, K levels.
    """
    K = weight.codebook.shape[-1]
    indices = unpack_indices(weight.packed, weight.bits, weight.in_features).long()
    R = weight.step.numel()
    counts = torch.zeros(R, K).scatter_add_(1, indices.view(R, -1), torch.ones(R, indices.numel() // R))
    levels = (weight.codebook.float() * weight.step.float().unsqueeze(-1)).view(R, K)
    rms = ((levels.square() * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)).sqrt()
    levels = levels / rms.clamp_min(torch.finfo(torch.float32).tiny)
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    # the outermost cells end as far from their level as they begin
    first, last = 2 * levels[:, :1] - middle[:, :1], 2 * levels[:, -1:] - middle[:, -1:]
    width = torch.cat((first, middle, last), dim=1).diff(dim=1)
    heights = torch.where(width > 0, counts / width, 0.0) / counts.sum(-1, keepdim=True)
    x = torch.linspace(-4, 4, bins)
    cell = torch.searchsorted(middle, x.expand(R, bins).contiguous())
    at = heights.gather(1, cell) * ((x >= first) & (x <= last))
    return x.tolist(), at.mean(0).tolist(), levels.mean(0).tolist()


# --- time ------------------------------------------------------------------------------------------------------------


def stages(folder: Path) -> list[dict[str, Any]]:
    """Time and peak memory by kind of unit, in the order of a run."""
    path = folder / "timings.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    total = sum(kind["seconds"] for kind in measured.values()) or 1.0
    return [
        {"name": name, "what": what, "share": measured[name]["seconds"] / total, **measured[name]}
        for name, what in STAGES.items()
        if name in measured
    ]
