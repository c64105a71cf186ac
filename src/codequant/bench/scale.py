"""Time and peak memory of a run against the number of layers and of workers, beside what `plan` predicts.

Sources are synthetic: random weights of the wanted shapes, written a tensor at a time. Every run is a process of its
own, so that the peak is the run's.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, Qwen3MoeConfig

from codequant.checkpoint_names import parameter_sources, skeleton
from codequant.data import DEMO_MODEL
from codequant.source import INDEX, write_shard

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
LAYERS = (2, 4, 8)
WORKERS = (1, 2)
SETTINGS = ("calibration.windows=16", "calibration.length=128", "rotation.steps=20")
_RUN = """
import json, resource, sys, time
from codequant.pipeline import quantize
arguments = json.loads(sys.argv[1])
begin = time.perf_counter()
quantize(**arguments)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
    return json.loads(done.stdout.splitlines()[-1])


def run(
    shape: str = "small", layers: Sequence[int] = LAYERS, workers: Sequence[int] = WORKERS, folder: Path | None = None
) -> Iterator[dict[str, Any]]:
    """One row per number of layers and of workers. Sources and outputs go to a temporary folder inside `folder`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="codequant-bench-") as place:
        for count in layers:
            source = write_checkpoint(Path(place) / f"source-{count}", synthetic_config(shape, count))
            for number in workers:
                out = Path(place) / f"out-{count}-{number}"
                numbers = measure(source=source, out=out, overrides=list(SETTINGS), workers=number)
                yield {"shape": shape, "layers": count, "workers": number, **numbers}
