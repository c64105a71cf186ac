"""The whole run: a bf16 MoE model goes in, a folder with the same model in codebook weights comes out.

Everything that can be wrong with the input is found before any work starts; the work itself is `units.graph`, a layer
at a time; the output appears under its name only when it is whole.
"""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from codequant.calibration import content_hash, read_documents, windows
from codequant.data import DEMO_CALIBRATION
from codequant.errors import InputError
from codequant.executor import Executor, LocalExecutor, Progress, run_units
from codequant.packing import BITS
from codequant.plan import Plan, disk_bytes, plan, workers_that_fit
from codequant.ray_executor import RayExecutor
from codequant.recipe import Calibration, Recipe, load_recipe
from codequant.report import write_report
from codequant.source import SourceModel, resolve
from codequant.store import Ledger, Store, versions, write_atomically
from codequant.units import WINDOWS, Context, graph, run_unit
from codequant.writing import write_output

log = logging.getLogger(__name__)
SCAN = "scan.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DEFAULT_CALIBRATION = DEMO_CALIBRATION
GPU_WORKERS = 2  # one reads and hashes while the other computes; a third makes a layer of Qwen3-30B-A3B 12% faster


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "w4a8",
    *,
    overrides: list[str] | None = None,
    calibration: str | Path | None = None,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    keep_work: bool = False,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Quantize a causal MoE language model into the folder `out`, which must not exist yet.

    source: a local folder or a hub id. recipe: a bundled name, a YAML file or a Recipe. overrides: `key=value` fields
    of the recipe. calibration: text to calibrate on (documents separated by three newlines, or .jsonl); by default the
    demo text that comes with the package. executor: units of work on threads of this process, or on a Ray cluster, by
    default one that is started here. workers: units of work at a time, by default one per CPU core, or two on a GPU.

    The work folder `<out>.codequant-work` keeps finished units: calling again after an interruption goes on where it
    stopped. Raises InputError for anything wrong with the input, before any work starts.
    """
    out = check_output(Path(out))
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    check_device(device)
    check_executor(executor, ray_address)
    model = SourceModel(resolve(source))
    tokens = calibration_windows(model, chosen.calibration, calibration)
    chosen = with_windows(chosen, len(tokens))
    work = work_folder(out)
    context = Context(model, chosen, Store(work), device)
    check_supported(context)
    check_disk(context, out.parent)
    files = scan_source(model, work)

    ledger = Ledger(work, identity(model, chosen, files, content_hash(tokens), device))
    try:
        write_atomically(work / SCAN, json.dumps(files))
        ledger.put(WINDOWS, {"windows": tokens.to(torch.int32)})
        runner = make_executor(executor, context, workers or default_workers(context), ray_address)
        try:
            run_units(graph(context), ledger, runner, listen)
        finally:
            runner.close()
        write_output(out, context, ledger, provenance(model, chosen, files, tokens))
        if not keep_work:
            shutil.rmtree(work, ignore_errors=True)  # before the lock goes, so that no other run moves in
    except OSError as error:
        raise InputError(f"{error}; finished work is kept in {work}, the same command goes on from there") from error
    finally:
        ledger.close()
    draw_report(out)
    return out


def make_executor(kind: str, context: Context, workers: int, ray_address: str | None) -> Executor:
    if kind == "ray":
        return RayExecutor(context, workers, ray_address)
    return LocalExecutor(lambda unit: run_unit(context, unit), workers)


def plan_run(
    source: str | Path,
    recipe: str | Path | Recipe = "w4a8",
    *,
    overrides: list[str] | None = None,
    workers: int | None = None,
    device: str = "cpu",
) -> Plan:
    """What `quantize` with these arguments will need, with as many calibration windows as the recipe asks for."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    check_device(device)
    context = Context(SourceModel(resolve(source)), chosen, Store(Path()), device)
    check_supported(context)
    return plan(context, workers or default_workers(context))


def draw_report(out: Path) -> None:
    """Write the report of a finished output. Whatever goes wrong here, the result of hours of work is whole."""
    try:
        write_report(out)
    except Exception as error:
        log.warning("%s: no report (%s), `codequant --debug report %s` says why", out, error, out)


def work_folder(out: Path) -> Path:
    """Where a run keeps its finished units, beside the output that it will become."""
    return out.with_name(f"{out.name}.codequant-work")


# --- what can be wrong, found before any work starts -----------------------------------------------------------------


def check_output(out: Path) -> Path:
    if out.exists():
        left = f"; {work} is left of an earlier run" if (work := work_folder(out)).exists() else ""
        raise InputError(f"out: {out} exists already, expected a new folder{left}")
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


def check_executor(kind: str, ray_address: str | None) -> None:
    if kind not in ("local", "ray"):
        raise InputError(f"executor: {kind!r}, expected local or ray")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError("executor: ray is not installed, `pip install 'codequant[ray]'` installs it")
    if kind != "ray" and ray_address is not None:
        raise InputError(f"ray address: {ray_address!r} with executor {kind!r}, expected executor ray")


def default_workers(context: Context) -> int:
    """One per CPU core as far as their units fit in memory; on a GPU, so many that one reads while another computes."""
    if context.device.type != "cpu":
        return GPU_WORKERS
    return workers_that_fit(context, len(os.sched_getaffinity(0)), psutil.virtual_memory().available)


def check_supported(context: Context) -> None:
    """Layers must be quantizable, and, unless the recipe says otherwise, their residual stream rotatable."""
    _ = context.config  # group sizes
    if context.recipe.finetuning.epochs and context.window_shards < 2:
        raise InputError(
            f"finetuning.epochs: {context.recipe.finetuning.epochs}, but calibration.windows_per_unit is "
            f"{context.recipe.calibration.windows_per_unit} of {context.recipe.calibration.windows} windows, expected "
            "at most half of them, so that one unit can be held out"
        )
    if (target := context.recipe.weights.target_bits) is not None:
        in_experts, others = context.quantized_weights()
        if not in_experts:
            raise InputError(
                f"weights.target_bits: {target}, but no expert is quantized, expected a model that has some"
            )
        spent = context.recipe.weights.bits * others
        least, most = ((spent + b * in_experts) / (in_experts + others) for b in (BITS[0], BITS[-1]))
        if not least <= target <= most:
            raise InputError(f"weights.target_bits: {target}, expected {least:.2f} to {most:.2f} for this model")
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
    """Enough room for hidden states, intermediate results and the output, beside what an interrupted run has left."""
    found = sum(path.stat().st_size for path in context.store.folder.rglob("*") if path.is_file())
    needed, free = disk_bytes(context), found + shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"disk: {free / 1e9:.2f} GB free in {folder}, expected about {needed / 1e9:.2f} GB for the work and output"
        )


def scan_source(model: SourceModel, work: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 of every shard, read once from end to end; raises InputError naming a tensor with NaN or infinity.

    Files whose size and time have not changed since an interrupted run are not read again.
    """
    try:
        known = json.loads((work / SCAN).read_bytes())
    except (OSError, ValueError):
        known = {}

    def scan(file: str) -> tuple[str, dict[str, Any]]:
        status = (model.folder / file).stat()
        stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        if (entry := known.get(file)) is not None and stamp.items() <= entry.items():
            return file, entry
        return file, {**stamp, "sha256": model.checkpoint.scan(file)}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(pool.map(scan, model.checkpoint.files))


def identity(
    model: SourceModel, recipe: Recipe, files: dict[str, dict[str, Any]], calibration: str, device: str
) -> dict[str, Any]:
    """What every result depends on. A work folder is only continued by a run with the same."""
    return {
        "source": {file: entry["sha256"] for file, entry in files.items()},
        "source config": json.loads(model.config.to_json_string()),
        "recipe": recipe.model_dump(),
        "calibration": calibration,
        "device": torch.device(device).type,  # sums are in another order there
        "versions": versions(),
    }


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
