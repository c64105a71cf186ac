"""The whole run: a bf16 MoE model goes in, a folder with the same model in codebook weights comes out.

Everything that can be wrong with the input is found before any work starts; the work itself is `units.graph`, a layer
at a time; the output appears under its name only when it is whole.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from codequant.calibration import content_hash, read_documents, windows
from codequant.data import DEMO_CALIBRATION
from codequant.errors import InputError
from codequant.executor import LocalExecutor, Progress, run_units
from codequant.recipe import Calibration, Recipe, load_recipe
from codequant.source import SourceModel, resolve
from codequant.store import Ledger, Store, file_sha256, write_atomically
from codequant.units import WINDOWS, Context, graph, run_unit
from codequant.writing import write_output

SCAN = "scan.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DEFAULT_CALIBRATION = DEMO_CALIBRATION


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "w4a8",
    *,
    overrides: list[str] | None = None,
    calibration: str | Path | None = None,
    workers: int | None = None,
    device: str = "cpu",
    keep_work: bool = False,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Quantize a causal MoE language model into the folder `out`, which must not exist yet.

    source: a local folder or a hub id. recipe: a bundled name, a YAML file or a Recipe. overrides: `key=value` fields
    of the recipe. calibration: text to calibrate on (documents separated by three newlines, or .jsonl); by default the
    demo text that comes with the package. workers: units of work at a time, by default one per CPU core (one on a GPU).

    The work folder `<out>.codequant-work` keeps finished units: calling again after an interruption goes on where it
    stopped. Raises InputError for anything wrong with the input, before any work starts.
    """
    out = check_output(Path(out))
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    check_device(device)
    model = SourceModel(resolve(source))
    tokens = calibration_windows(model, chosen.calibration, calibration)
    chosen = with_windows(chosen, len(tokens))
    work = work_folder(out)
    context = Context(model, chosen, Store(work), device)
    check_supported(context)
    check_disk(context, out.parent)
    files = scan_source(model, work)

    ledger = Ledger(work, identity(model, chosen, files, content_hash(tokens)))
    try:
        write_atomically(work / SCAN, json.dumps(files))
        ledger.put(WINDOWS, {"windows": tokens.to(torch.int32)})
        executor = LocalExecutor(lambda unit: run_unit(context, unit), workers or default_workers(device))
        try:
            run_units(graph(context), ledger, executor, listen)
        finally:
            executor.close()
        write_output(out, context, ledger, provenance(model, chosen, files, tokens))
    finally:
        ledger.close()
    if not keep_work:
        shutil.rmtree(work, ignore_errors=True)
    return out


def work_folder(out: Path) -> Path:
    """Where a run keeps its finished units, beside the output that it will become."""
    return out.with_name(f"{out.name}.codequant-work")


# --- what can be wrong, found before any work starts -----------------------------------------------------------------


def check_output(out: Path) -> Path:
    if out.exists():
        raise InputError(f"out: {out} exists already, expected a new folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"out: {out.absolute().parent} is no folder, expected an existing parent folder")
    return out


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device: {device!r}, expected cpu or cuda[:N]") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(
            f"device: {device!r} is not available here, expected cpu{' or cuda' * torch.cuda.is_available()}"
        )


def default_workers(device: str) -> int:
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def check_supported(context: Context) -> None:
    """Layers must be quantizable, and, unless the recipe says otherwise, their residual stream rotatable."""
    _ = context.config  # group sizes
    if context.rotates:
        for name, structure in zip(context.source.layer_names, context.source.structures):
            if structure.obstacles:
                raise InputError(
                    f"{name}: the residual stream cannot be rotated ({structure.obstacles[0]}); "
                    "--set rotation.method=none quantizes without a rotation"
                )


def calibration_windows(model: SourceModel, recipe: Calibration, text: str | Path | None) -> Tensor:
    """int64 [N, T] token windows; N is what the recipe asks for, or less where the text is short."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and recipe.length > limit:
        raise InputError(f"calibration.length: {recipe.length}, expected at most {limit}, the model's own context")
    return windows(
        read_documents(text or DEFAULT_CALIBRATION),
        load_tokenizer(model.folder),
        recipe.windows,
        recipe.length,
        recipe.seed,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make up an empty one
        raise InputError(f"{folder}: no usable tokenizer, expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: no usable tokenizer ({' '.join(str(error).split())[:160]})") from error


def with_windows(recipe: Recipe, count: int) -> Recipe:
    """The recipe with the number of windows that there really are."""
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"windows": count})})


def check_disk(context: Context, folder: Path) -> None:
    """Enough room for hidden states, one layer's intermediate results and the output."""
    needed, free = disk_bytes(context), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"disk: {free / 1e9:.1f} GB free in {folder}, expected about {needed / 1e9:.1f} GB for the work and output"
        )


def disk_bytes(context: Context) -> int:
    """Upper estimate of what a run keeps on disk at its fullest."""
    recipe, source = context.recipe, context.source
    stream = recipe.calibration.windows * recipe.calibration.length * source.hidden_size * 4
    samples = recipe.rotation.samples * source.hidden_size * 2
    stored = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    model = sum(stored.get(e.dtype, 1) * math.prod(e.shape) for e in source.checkpoint.entries.values())
    # the teacher's states at every layer, the student's and the experts' inputs at one; the output is no larger than
    # the source
    return stream * (source.num_layers + 1 + 4) + samples + model


def scan_source(model: SourceModel, work: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 of every shard, read once from end to end; raises InputError naming a tensor with NaN or infinity.

    Files whose size and time have not changed since an interrupted run are not read again.
    """
    known = json.loads((work / SCAN).read_text()) if (work / SCAN).is_file() else {}

    def scan(file: str) -> tuple[str, dict[str, Any]]:
        path = model.folder / file
        stamp = {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        if (entry := known.get(file)) is not None and stamp.items() <= entry.items():
            return file, entry
        model.checkpoint.check_finite(file)
        return file, {**stamp, "sha256": file_sha256(path)}

    with ThreadPoolExecutor(default_workers("cpu")) as pool:
        return dict(pool.map(scan, model.checkpoint.files))


def identity(model: SourceModel, recipe: Recipe, files: dict[str, dict[str, Any]], calibration: str) -> dict[str, Any]:
    """What every result depends on. A work folder is only continued by a run with the same."""
    return {
        "source": {file: entry["sha256"] for file, entry in files.items()},
        "source config": model.config.to_json_string(),
        "recipe": recipe.model_dump(),
        "calibration": calibration,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("codequant", "torch", "transformers")}


def provenance(model: SourceModel, recipe: Recipe, files: dict[str, dict[str, Any]], tokens: Tensor) -> dict[str, Any]:
    """What codequant.json says about where the output comes from; nothing that differs between identical runs."""
    return {
        "recipe": recipe.model_dump(),
        "source": {
            "name": model.folder.resolve().name,
            "architecture": type(model.model).__name__,
            "files": {file: entry["sha256"] for file, entry in files.items()},
        },
        "calibration": {"sha256": content_hash(tokens), "windows": len(tokens), "length": tokens.shape[1]},
        "versions": versions(),
    }
