"""Time and peak memory of a run against the number of layers and of workers, beside what `plan` predicts; and of the
same units on Ray.

Sources are synthetic: random weights of the wanted shapes, written a tensor at a time. Every run is a process of its
own, so that the peak is the run's.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PretrainedConfig, Qwen3MoeConfig

from codequant.checkpoint_names import parameter_sources, skeleton
from codequant.data import DEMO_MODEL
from codequant.pipeline import plan_run
from codequant.source import INDEX, write_shard
from codequant.writing import TIMINGS

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "vocab_size": 8192,
    },
    "qwen3-30b": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    },
}
LAYERS = "2,4,8"
WORKERS = "1,2"
EXECUTORS = "local"
SETTINGS = ("calibration.windows=16", "calibration.length=128", "rotation.steps=20")
# The peak is the kernel's VmHWM: getrusage's would be the caller's own, if that is larger, for it outlives exec.
_RUN = """
import json, sys, time
from codequant.pipeline import quantize
arguments = json.loads(sys.argv[1])
begin = time.perf_counter()
quantize(**arguments)
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"seconds": round(time.perf_counter() - begin, 2), "peak_bytes": peak}))
"""


def synthetic_config(shape: str, layers: int) -> PretrainedConfig:
    """A Qwen3-MoE of the named shape."""
    return Qwen3MoeConfig(
        **SHAPES[shape],
        num_hidden_layers=layers,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """A source folder of random bf16 weights, one shard per layer, and the demo model's tokenizer."""
    folder.mkdir(parents=True)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for source in (s for entries in parameter_sources(skeleton(config)).values() for s in entries):
        layer = source.name.split(".")[2] if ".layers." in source.name else "ends"
        shards.setdefault(f"model-{layer}.safetensors", {})[source.name] = source.shape

    def data(shapes: dict[str, tuple[int, ...]]) -> Iterator[memoryview]:
        for shape in shapes.values():
            if len(shape) == 1:  # the gain of a norm
                tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
            else:
                tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            yield tensor.bfloat16().view(torch.uint8).numpy().data.cast("B")

    weight_map: dict[str, str] = {}
    for file, shapes in shards.items():
        entries = {name: ("BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()}
        write_shard(folder / file, entries, data(shapes))
        weight_map |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def measure(**arguments: Any) -> dict[str, Any]:
    """Seconds and peak resident bytes of one `quantize` in a process of its own."""
    text = json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()})
    done = subprocess.run([sys.executable, "-c", _RUN, text], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    stages = json.loads((Path(arguments["out"]) / TIMINGS).read_text()).values()
    worker_seconds = round(sum(stage["cpu_seconds"] for stage in stages), 1)
    return {**json.loads(done.stdout.splitlines()[-1]), "worker_seconds": worker_seconds}


def run(
    shape: str,
    layers: Sequence[int],
    workers: Sequence[int],
    settings: Sequence[str],
    folder: Path | None = None,
    executors: Sequence[str] = (EXECUTORS,),
) -> Iterator[dict[str, Any]]:
    """One row per number of layers, of workers and executor. Sources and outputs go to a temporary folder in `folder`.

    worker_seconds are processor seconds of all units: unlike `seconds`, other processes hardly disturb them. The peak
    is that of the process that was called: with Ray, not of the workers.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="codequant-bench-") as place:
        for count in layers:
            source = write_checkpoint(Path(place) / f"source-{count}", synthetic_config(shape, count))
            for number, executor in itertools.product(workers, executors):
                plan = plan_run(source, overrides=list(settings), workers=number)
                out = Path(place) / f"out-{count}-{number}-{executor}"
                numbers = measure(source=source, out=out, overrides=list(settings), workers=number, executor=executor)
                shutil.rmtree(out)
                yield {
                    "shape": shape,
                    "layers": count,
                    "workers": number,
                    "executor": executor,
                    **numbers,
                    "planned_seconds": plan.seconds,
                    "planned_worker_seconds": plan.worker_seconds,
                    "planned_bytes": plan.memory_bytes,
                }
            shutil.rmtree(source)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    found = Table(
        *("shape", "layers", "workers", "executor", "seconds", "worker seconds", "planned", "peak MiB", "planned"),
        box=None,
    )
    for r in rows:
        numbers = (r["seconds"], r["worker_seconds"], r["planned_worker_seconds"])
        sizes = (r["peak_bytes"] / 2**20, r["planned_bytes"] / 2**20)
        found.add_row(
            r["shape"],
            *map(str, (r["layers"], r["workers"], r["executor"])),
            *(f"{n:.1f}" for n in numbers),
            *(f"{n:.0f}" for n in sizes),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="codequant bench scale", description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", default=LAYERS, help="numbers of layers, comma-separated")
    parser.add_argument("--workers", default=WORKERS, help="numbers of workers, comma-separated")
    parser.add_argument("--executors", default=EXECUTORS, help="local, ray or both, comma-separated")
    parser.add_argument("--set", action="append", default=None, dest="settings", help="recipe field: stage.key=value")
    parser.add_argument("--folder", type=Path, help="where sources and outputs go for a while")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args(arguments)
    layers, workers = ([int(n) for n in text.split(",")] for text in (a.layers, a.workers))
    rows = list(run(a.shape, layers, workers, a.settings or SETTINGS, a.folder, a.executors.split(",")))
    Console().print(table(rows))
    if a.json:
        a.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
