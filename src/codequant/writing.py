"""Assemble the output folder from finished units: shards, index, config, tokenizer and provenance.

The folder is built inside the work folder and renamed when it is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from codequant.errors import InputError
from codequant.source import INDEX, SIDE_FILES
from codequant.store import Ledger, file_sha256
from codequant.units import Context, layer_key

PROVENANCE = "codequant.json"
TIMINGS = "timings.json"
RECIPE = "recipe.yaml"
ROTATION = "rotation.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def write_output(out: Path, context: Context, ledger: Ledger, provenance: dict[str, Any]) -> None:
    """Write everything to `out`. The results in the work folder are left as they are."""
    temporary = ledger.folder / "output"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    temporary.mkdir()
    try:
        copy_side_files(context.source.folder, temporary)
        keys = ["ends", *(layer_key(l) for l in range(context.source.num_layers))]
        shards = [ledger.store.path(key) for key in keys]
        if (extra := write_unknown_tensors(context, temporary)) is not None:
            shards.append(extra)
        weight_map, total = place_shards(shards, temporary)
        (temporary / INDEX).write_text(to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        (temporary / "config.json").write_text(to_json(output_config(context)))
        (temporary / RECIPE).write_text(yaml.safe_dump(context.recipe.model_dump(), sort_keys=False))
        if context.rotates:
            link(ledger.store.path("rotation"), temporary / ROTATION)
        summary = {**provenance, **summarize(ledger), "files": hashes(temporary)}
        (temporary / PROVENANCE).write_text(to_json(summary))
        (temporary / TIMINGS).write_text(to_json(timings(ledger)))
        if out.exists():
            raise InputError(f"out: {out} was made by somebody else in the meantime, expected a new folder")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def copy_side_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config, chat template, licence: everything that is not weights or configuration."""
    for pattern in (*SIDE_FILES, "LICENSE*"):
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in ("config.json", INDEX, PROVENANCE, TIMINGS):
                shutil.copyfile(path, out / path.name)


def write_unknown_tensors(context: Context, out: Path) -> Path | None:
    """Tensors that the model does not use (layers for multi-token prediction) are kept byte for byte."""
    known = {source.name for entries in context.source.sources.values() for source in entries}
    checkpoint = context.source.checkpoint
    quantized_parts = ("_scale_inv", "_blocks", "_scales")
    unknown = [
        name
        for name in sorted(checkpoint.entries)
        if name not in known
        and not any(name.endswith(p) and name.removesuffix(p) in known for p in quantized_parts)
        and not (context.source.is_tied and name == f"{context.source.head_name}.weight")
    ]
    if not unknown:
        return None
    path = out / ".unknown.safetensors"
    checkpoint.copy_raw(unknown, path)
    return path


def place_shards(shards: list[Path], out: Path) -> tuple[dict[str, str], int]:
    """Put the shards under their final names; returns the index's weight map and the bytes of all tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        link(shard, out / name)
        if shard.parent == out:
            shard.unlink()
        with safe_open(out / name, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    return weight_map, total


def link(source: Path, target: Path) -> None:
    """A second name for a finished file where the file system has hard links, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def output_config(context: Context) -> dict[str, Any]:
    config = json.loads((context.source.folder / "config.json").read_text())
    config["quantization_config"] = context.output_config().to_dict()
    config["tie_word_embeddings"] = False  # the head carries the final norm's gain
    return config


def summarize(ledger: Ledger) -> dict[str, Any]:
    """What the report shows: rotation, per-layer and per-matrix errors, tokens per expert."""
    layers: dict[str, dict[str, Any]] = {}
    for key, info in ledger.infos("dense."):
        layers[key.split(".")[1]] = {"proof": info["proof"], "errors": info["errors"], "tokens": {}, "starved": []}
        if "finetuning" in info:
            layers[key.split(".")[1]]["finetuning"] = {"dense": info["finetuning"]}
    for key, info in ledger.infos("experts."):
        layer = layers[key.split(".")[1]]
        layer["errors"] |= info["errors"]
        layer["tokens"] |= {str(expert): n for expert, n in info["tokens"].items()}
        layer["starved"] += info["starved"]
        if "finetuning" in info:
            layer["finetuning"] |= {str(expert): result for expert, result in info["finetuning"].items()}
    for key, info in ledger.infos("student."):
        layers[key.split(".")[1]].setdefault("differences", []).append(info["difference"])
    found: dict[str, Any] = {"layers": {str(int(name[1:])): layer for name, layer in layers.items()}}
    for name in ("rotation", "allocation"):
        found[name] = next((info for _, info in ledger.infos(name)), None)
    return found


def timings(ledger: Ledger) -> dict[str, Any]:
    """Seconds and peak memory by kind of unit; the only file of the output that differs between identical runs."""
    kinds: dict[str, dict[str, float]] = {}
    for record in ledger.records.values():
        if record.measured:
            kind = kinds.setdefault(
                record.key.split(".")[0], {"units": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0}
            )
            kind["units"] += 1
            for name in ("seconds", "cpu_seconds"):
                kind[name] = round(kind[name] + record.measured[name], 4)
            kind["peak_bytes"] = max(kind["peak_bytes"], record.measured["peak_bytes"])
    return kinds


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
