"""The command line: every kind of bad input gets one line, the right exit code, and leaves nothing behind."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import SMALL, TEXT, write_source
from transformers import T5Config

from codequant import cli, pipeline

SETS = [word for override in SMALL for word in ("--set", override)]


def run(*arguments: object) -> int:
    """Exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            patch.setenv(name, "error")  # the command sets them for its process; other tests must not see that
        patch.setattr(sys, "argv", ["codequant", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
    return stop.value.code or 0


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source("qwen3_moe", tmp_path_factory.mktemp("model") / "source")


@pytest.fixture
def source(shared_source: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(shared_source, tmp_path / "source"))


@pytest.fixture(scope="module")
def quantized(shared_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_text(TEXT)
    assert run("quantize", shared_source, folder / "out", "--calibration", folder / "text.txt", *SETS) == 0
    return folder / "out"


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def edit_tensor(folder: Path, name_end: str, edit) -> str:
    """Change one tensor of a folder on disk; returns its name."""
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(name_end):
                tensors[name] = edit(tensors[name].clone())
                save_file(tensors, file, {"format": "pt"})
                return name
    raise AssertionError(name_end)


def to_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


def break_nothing(source: Path) -> None:
    pass


def break_config(source: Path) -> None:
    T5Config(vocab_size=67).save_pretrained(source)


def break_escape(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "../stolen.safetensors"
    index.write_text(json.dumps(values))


def break_truncate(source: Path) -> None:
    file = first_shard(source)
    file.write_bytes(file.read_bytes()[:-100])


def break_missing(source: Path) -> None:
    first_shard(source).unlink()


def break_nan(source: Path) -> None:
    edit_tensor(source, "experts.2.up_proj.weight", to_nan)


def break_tokenizer(source: Path) -> None:
    for file in source.glob("tokenizer*"):
        file.unlink()


def break_quantized(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "extra", "message"),
    [
        (shutil.rmtree, [], "expected an existing model folder or a hub id"),
        (break_config, [], "model_type 't5' is no causal language model"),
        (break_escape, [], "lm_head.weight lies in '../stolen.safetensors', expected a file name inside"),
        (break_truncate, [], "not a whole safetensors file"),
        (break_missing, [], "missing, expected the shard that"),
        (break_nan, [], "mlp.experts.2.up_proj.weight: holds NaN or infinity"),
        (break_tokenizer, [], "no usable tokenizer"),
        (break_quantized, [], "quant_method 'gptq', expected an unquantized, fp8 or mxfp4 source"),
        (break_nothing, ["--recipe", "w5a8"], "recipe: 'w5a8', expected a YAML file or one of"),
        (break_nothing, ["--set", "weights.bitz=3"], "unknown key 'weights.bitz', did you mean 'weights.bits'?"),
        (break_nothing, ["--set", "weights.bits=5"], "weights.bits: 5"),
        (break_nothing, ["--set", "weights"], "expected key=value"),
        (break_nothing, ["--set", "weights.group_size=7"], "group_size: 7, expected -1 or a positive divisor of 48"),
        (break_nothing, ["--calibration", "nowhere.txt"], "nowhere.txt"),
        (break_nothing, ["--set", "calibration.length=129"], "calibration.length: 129, expected at most 128"),
        (break_nothing, ["--device", "abacus"], "device: 'abacus', expected cpu or cuda"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(damage, extra, message, source, tmp_path, capsys) -> None:
    damage(source)
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments = [*SETS, "--calibration", tmp_path / "text.txt", *extra]
    assert run("quantize", source, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("codequant: ") and error.count("\n") == 1, error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"), [("", "no text"), ("ant", "tokens, expected at least 16, which is one window")]
)
def test_bad_calibration_text(text, message, source, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text(text)
    assert run("quantize", source, tmp_path / "out", *SETS, "--calibration", tmp_path / "text.txt") == 2
    assert message in capsys.readouterr().err


def test_existing_output_is_left_alone(source, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert run("quantize", source, tmp_path / "out", *SETS, "--calibration", tmp_path / "text.txt") == 2
    error = capsys.readouterr().err
    assert "exists already" in error and "is left of" not in error
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_work_left_beside_a_finished_output_is_named(source, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.codequant-work").mkdir()
    assert run("quantize", source, tmp_path / "out", *SETS, "--calibration", tmp_path / "text.txt") == 2
    assert f"{tmp_path / 'out.codequant-work'} is left of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out.codequant-work").is_dir()


def test_no_room_on_disk(source, tmp_path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run("quantize", source, tmp_path / "out", *SETS, "--calibration", tmp_path / "text.txt") == 2
    assert "disk: 0.00 GB free" in capsys.readouterr().err
    assert not pipeline.work_folder(tmp_path / "out").exists()


def test_interruption_keeps_the_work_and_goes_on(source, tmp_path, capsys, monkeypatch) -> None:
    arguments = ["quantize", source, tmp_path / "out", *SETS, "--calibration", tmp_path / "text.txt", "--workers", 1]
    original, ran = pipeline.run_unit, []

    def interrupt(context, unit):
        if len(ran) == 9:
            raise KeyboardInterrupt
        ran.append(unit.key)
        return original(context, unit)

    monkeypatch.setattr(pipeline, "run_unit", interrupt)
    assert run(*arguments) == 130
    assert "interrupted: finished work is kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    def count(context, unit):
        assert unit.key not in ran, "a finished unit was run again"
        return original(context, unit)

    monkeypatch.setattr(pipeline, "run_unit", count)
    assert run(*arguments) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_verify_evaluate_inspect_generate(quantized, shared_source, tmp_path, capsys) -> None:
    assert run("verify", quantized, "--source", shared_source) == 0
    assert capsys.readouterr().out.count("ok  ") == 5
    text = quantized.parent / "text.txt"
    numbers = tmp_path / "numbers.json"
    scored = ["--windows", 4, "--length", 16, "--text", text, "--json", numbers]
    assert run("evaluate", quantized, "--reference", shared_source, *scored) == 0
    found = json.loads(numbers.read_text())
    assert {"perplexity", "reference_perplexity", "kl", "router_change", "bits_per_weight", "tokens"} <= found.keys()
    assert found["tokens"] == 4 * 15 and 0 < found["kl"] < 0.5
    assert run("report", quantized, "--evaluation", numbers) == 0
    assert f"{found['perplexity']:.3f}" in (quantized / "report.html").read_text()
    assert run("verify", quantized) == 0  # the page is no part of what is hashed
    whole = ["--windows", 0, "--length", 16, "--text", text, "--json", numbers]
    assert run("evaluate", quantized, *whole) == 0
    assert json.loads(numbers.read_text())["tokens"] > 15 * 100  # 32 documents of some 60 characters, in order
    assert run("evaluate", quantized, "--tasks", "piqua", "--task-dir", tmp_path) == 2
    capsys.readouterr()
    assert run("inspect", quantized, "--json", "-") == 0
    assert '"bits_per_weight"' in capsys.readouterr().out
    assert run("generate", quantized, "The fox", "--max-new-tokens", 3) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The fox") and "tokens/s" in captured.err


@pytest.mark.parametrize(
    ("name_end", "edit", "message"),
    [
        ("q_proj.weight_codebook", lambda t: t.flip(-1).contiguous(), "entries are not ascending"),
        ("k_proj.weight_step", lambda t: to_nan(t), "holds NaN or infinity"),
        ("v_proj.weight_step", lambda t: -t, "holds a negative step"),
        ("o_proj.weight_packed", lambda t: t[:-1].contiguous(), "expected uint8"),
        ("experts.1.down_proj.weight_packed", lambda t: t ^ 1, "SHA-256"),
    ],
)
def test_verify_names_what_is_damaged(name_end, edit, message, quantized, tmp_path, capsys) -> None:
    damaged = Path(shutil.copytree(quantized, tmp_path / "damaged"))
    name = edit_tensor(damaged, name_end, edit)
    if message != "SHA-256":  # let the checks behind the hashes see it
        provenance = json.loads((damaged / "codequant.json").read_text())
        provenance["files"] = {}
        (damaged / "codequant.json").write_text(json.dumps(provenance))
    capsys.readouterr()
    assert run("verify", damaged) == 3
    error = capsys.readouterr().err
    assert message in error and (name in error or message == "SHA-256"), error


def test_usage_errors_exit_with_2(capsys) -> None:
    assert run("quantize") == 2
    assert run("frobnicate") == 2
