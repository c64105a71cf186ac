"""The command line. Results go to stdout, progress and logs to stderr.

Exit codes: 0 fine, 1 unexpected, 2 bad input, 3 verification failed, 130 interrupted. Bad input gets one line; a
traceback only with --debug.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from codequant.errors import InputError, InvarianceError, VerificationError
from codequant.stages import STAGES

if TYPE_CHECKING:
    from codequant.executor import Progress as UnitProgress

app = typer.Typer(
    name="codequant",
    help="Run Mixture-of-Experts language models in 4 bits: quantize, verify, evaluate, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
INTERRUPTED = 130
BENCHMARKS = ("accuracy", "clustering", "cpu", "gpu", "scale")

Source = Annotated[str, typer.Argument(help="local model folder or hub id")]
Folder = Annotated[Path, typer.Argument(help="folder written by codequant")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a field of the recipe: stage.key=value")]
TargetBits = Annotated[
    float | None, typer.Option(help="average bits per weight; experts get 2, 3 or 4 by what those cost the model")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the numbers to this file too ('-': stdout)")]
Device = Annotated[str, typer.Option(help="cpu or cuda[:N]")]


@app.callback()
def setup(
    debug: Annotated[bool, typer.Option(help="show tracebacks and debug logs")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show what is chosen on the way")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("codequant").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its bars and hints would mix with ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


class Memory(ProgressColumn):
    """Resident memory of this process."""

    def render(self, task: Task) -> Text:
        import psutil

        return Text(f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB", style="dim")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; yields update(what is being done, done, total)."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Memory(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def with_target(overrides: list[str] | None, target_bits: float | None) -> list[str] | None:
    return overrides if target_bits is None else [*(overrides or []), f"weights.target_bits={target_bits}"]


def describe(progress: "UnitProgress") -> str:
    layer = progress.unit.arguments.get("layer")
    return STAGES[progress.unit.function] + (f", layer {layer}" if layer is not None else "")


def write_json(values: dict[str, Any], file: Path | None) -> None:
    if file is None:
        return
    text = json.dumps(values, indent=2)
    if str(file) == "-":
        sys.stdout.write(text + "\n")
    else:
        file.write_text(text + "\n", encoding="utf-8")


@app.command()
def quantize(
    source: Source,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; must not exist")],
    recipe: Annotated[str, typer.Option(help="bundled recipe or YAML file")] = "w4a8",
    overrides: Overrides = None,
    target_bits: TargetBits = None,
    calibration: Annotated[
        str | None, typer.Option(help="text file (documents separated by three newlines) or .jsonl; default: bundled")
    ] = None,
    executor: Annotated[str, typer.Option(help="local or ray: threads of this process, or a Ray cluster")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="of a running Ray cluster; default: one is started")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="units of work at a time; default: CPU cores")] = None,
    device: Device = "cpu",
    keep_work: Annotated[bool, typer.Option(help="keep the work folder after success")] = False,
) -> None:
    """Quantize a Mixture-of-Experts model into a folder that loads in transformers.

    An interrupted run goes on where it stopped: type the same command again.
    """
    overrides = with_target(overrides, target_bits)
    run_quantize(source, output, recipe, overrides, calibration, executor, ray_address, workers, device, keep_work)
    out.print(f"{output}: written. Next: codequant verify {output}", soft_wrap=True)


def run_quantize(
    source: str | Path,
    output: Path,
    recipe: str,
    overrides: list[str] | None = None,
    calibration: str | Path | None = None,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    keep_work: bool = False,
) -> None:
    from codequant import pipeline

    def show(progress: "UnitProgress") -> None:
        update(describe(progress), progress.done, progress.total)
        if not err.is_terminal and progress.unit.function == "layer":
            err.print(f"{describe(progress)}: {progress.done} of {progress.total} units done")

    with progress_bar("checking the source") as update:
        try:
            pipeline.quantize(
                source,
                output,
                recipe,
                overrides=overrides,
                calibration=calibration,
                executor=executor,
                ray_address=ray_address,
                workers=workers,
                device=device,
                keep_work=keep_work,
                listen=show,
            )
        except KeyboardInterrupt:
            work = pipeline.work_folder(output)
            if work.is_dir():
                err.print(
                    f"interrupted: finished work is kept in {work}; the same command goes on from there", soft_wrap=True
                )
            raise


@app.command()
def plan(
    source: Source,
    recipe: Annotated[str, typer.Option(help="bundled recipe or YAML file")] = "w4a8",
    overrides: Overrides = None,
    target_bits: TargetBits = None,
    workers: Annotated[int | None, typer.Option(min=1, help="units of work at a time; default: CPU cores")] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Predict the memory, disk and time of a run from the config and the shards' headers; reads no weights."""
    from codequant.pipeline import plan_run
    from codequant.plan import as_table

    found = plan_run(source, recipe, overrides=with_target(overrides, target_bits), workers=workers, device=device)
    out.print(as_table(found))
    write_json(found.to_dict(), json_file)


@app.command()
def verify(
    folder: Folder,
    source: Annotated[str | None, typer.Option(help="the model it was made from, to compare hashes")] = None,
) -> None:
    """Check a folder completely: names, shapes, types, values, codebooks, hashes. Exit code 3 if anything is wrong."""
    run_verify(folder, source)


def run_verify(folder: Path, source: str | None = None) -> None:
    from codequant import verification
    from codequant.source import resolve

    for check in verification.verify(folder, resolve(source) if source is not None else None):
        out.print(f"[green]ok[/]  {check}")


@app.command()
def evaluate(
    folder: Folder,
    reference: Annotated[str | None, typer.Option(help="source model to compare with")] = None,
    text: Annotated[
        str | None, typer.Option(help="text file, .jsonl, wikitext2 or c4; default: bundled held-out text")
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="token windows to score; 0: the whole text in order")] = 64,
    length: Annotated[int, typer.Option(min=2, help="tokens per window, at most the model's context")] = 512,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks too, separated by commas")] = None,
    task_folder: Annotated[Path | None, typer.Option("--task-dir", help="folder of local task files")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples per task")] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Perplexity, and with --reference KL divergence, router changes and per-layer error, all in float32."""
    run_evaluate(folder, reference, text, windows, length, json_file, tasks, task_folder, limit, device)


def run_evaluate(
    folder: Path,
    reference: str | Path | None,
    text: str | Path | None,
    windows: int,
    length: int,
    json_file: Path | None = None,
    tasks: str | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    import codequant
    from codequant import calibration, evaluation
    from codequant.corpora import evaluation_documents
    from codequant.data import DEMO_HELDOUT
    from codequant.inspection import inspect_folder
    from codequant.pipeline import check_device
    from codequant.source import load_config, resolve
    from codequant.tasks import Tasks, render, score
    from codequant.writing import ROTATION

    check_device(device)
    documents = evaluation_documents(text or DEMO_HELDOUT, whole=windows == 0)
    chosen = Tasks([name.strip() for name in tasks.split(",")], task_folder) if tasks is not None else None
    source = None
    if reference is not None:
        path = resolve(reference)
        load_config(path)
        source = evaluation.load_reference(path, device)
    model, tokenizer = codequant.load(folder, dtype=torch.float32, device=device)
    length = evaluation.context_length(model, length)
    if windows == 0:
        tokens = calibration.consecutive_windows(documents, tokenizer, length)
    else:
        tokens = calibration.windows(documents, tokenizer, windows, length, seed=1)
    rotation = load_file(folder / ROTATION)["rotation"] if (folder / ROTATION).is_file() else None
    done = 0
    with progress_bar("evaluating") as update:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            update("evaluating", done, len(tokens))

        found = evaluation.evaluate(
            model, tokens, source, rotation, inspect_folder(folder).bits_per_weight, advance=advance
        )
        out.print(evaluation.render(found))
        numbers = found.to_dict()
        if chosen is not None:
            numbers["tasks"] = score(chosen, model, source, tokenizer, limit, update)
            out.print(render(numbers["tasks"]))
    write_json(numbers, json_file)
    return numbers


@app.command()
def generate(
    folder: Folder,
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token")] = 0.0,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Continue a prompt; the text streams to stdout, tokens per second go to stderr."""
    run_generate(folder, prompt, max_new_tokens, temperature, seed, device)


def run_generate(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str = "cpu"
) -> None:
    import codequant
    from codequant import generation
    from codequant.pipeline import check_device

    check_device(device)
    model, tokenizer = codequant.load(folder, device=device)

    def emit(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    emit(prompt)
    result = generation.generate(model, tokenizer, prompt, max_new_tokens, temperature, seed, emit)
    emit("\n")
    err.print(
        f"[dim]prompt {result.prompt_tokens} tokens, {result.prompt_rate:.1f} tokens/s; "
        f"decode {result.new_tokens} tokens, {result.decode_rate:.1f} tokens/s[/]"
    )


@app.command()
def inspect(folder: Folder, json_file: JsonFile = None) -> None:
    """List what a folder holds: bits, groups, sizes, recipe and origin. Reads headers only."""
    from codequant import inspection

    found = inspection.inspect_folder(folder)
    out.print(inspection.render(found))
    write_json(found.to_dict(), json_file)


@app.command()
def export(
    folder: Folder,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="file (gguf) or folder (bf16) to write; must not exist")
    ],
    format: Annotated[str, typer.Option(help="gguf (Q8_0, exact) or bf16 (plain safetensors)")] = "gguf",
) -> None:
    """Write the quantized model for other engines; refuses by name what they cannot represent."""
    from codequant.export import export as write

    out.print(f"{write(folder, output, format)}: written", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="cpu, gpu, clustering, accuracy or scale; then its own options, or --help")
    ],
) -> None:
    """Measure kernels, clustering, accuracy or scaling on this machine."""
    from importlib import import_module

    if name not in BENCHMARKS:
        raise InputError(f"bench: {name!r}, expected one of {', '.join(BENCHMARKS)}")
    import_module(f"codequant.bench.{name}").main(context.args)


@app.command()
def report(
    folder: Folder,
    evaluation: Annotated[Path | None, typer.Option(help="numbers to show too, from `evaluate --json FILE`")] = None,
) -> None:
    """Write report.html into a folder anew: errors, activations, routing, weights and time, as one page."""
    from codequant.report import read_evaluation, write_report

    path = write_report(folder, read_evaluation(evaluation) if evaluation is not None else None)
    out.print(f"{path}: written", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; must not exist")] = Path(
        "demo-output"
    ),
) -> None:
    """The whole way on the bundled model: quantize, verify, evaluate, generate."""
    from codequant.data import DEMO_CALIBRATION, DEMO_HELDOUT, DEMO_MODEL
    from codequant.report import write_report

    start = time.monotonic()
    out.rule("quantize (recipe w4a8)", align="left")
    run_quantize(DEMO_MODEL, output, "w4a8", calibration=DEMO_CALIBRATION)
    out.print(f"{output}: written in {time.monotonic() - start:.0f} s")
    out.rule("verify", align="left")
    run_verify(output)
    out.rule("evaluate against the bf16 model on held-out text", align="left")
    evaluation = run_evaluate(output, DEMO_MODEL, DEMO_HELDOUT, windows=24, length=512)
    write_report(output, evaluation)
    out.rule("generate", align="left")
    run_generate(output, "The old house on the hill", max_new_tokens=80, temperature=0.7, seed=0)
    out.rule(f"done in {time.monotonic() - start:.0f} s", align="left")
    out.print(f"The quantized model is in {output}, and what was done to it in {output / 'report.html'}. Next:")
    for command in (
        f"codequant inspect {output}",
        f'codequant generate {output} "Once upon a time"',
        "codequant quantize MODEL OUT --calibration TEXT",
    ):
        out.print(f"  {command}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: turns what a user can hit into one line and an exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except (InputError, VerificationError, InvarianceError) as error:
        if debug:
            raise
        sys.stderr.write(f"codequant: {error}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # usage errors of the command line itself
            error.show()
            sys.exit(2)
        if debug:
            raise
        sys.stderr.write(f"codequant: unexpected {type(error).__name__}: {error} (--debug shows where)\n")
        sys.exit(1)
