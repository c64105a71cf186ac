"""Inspection: what it counts is what the files hold, to the byte and to the parameter."""

import json
from pathlib import Path

import pytest
from helpers import FAMILIES, quantize_rtn_checkpoint, random_model
from rich.console import Console
from safetensors import safe_open

from codequant.errors import InputError, VerificationError
from codequant.inspection import inspect_folder, render
from codequant.quantization_config import QuantizationConfig, Scheme

CONFIG = QuantizationConfig(
    Scheme(bits=3, activation_bits=8),  # odd widths: 20 columns in 3 bits end within a byte
    ignore=("lm_head", "*.gate", "*.router"),
    overrides={"*.self_attn.*": {"bits": 4, "group_size": 4, "activation_bits": 16}},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_totals_are_the_models_and_the_files(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    quantize_rtn_checkpoint(model, tmp_path, CONFIG, shards=2)
    inspection = inspect_folder(tmp_path)
    assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())
    stored = 0
    for shard in tmp_path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a mapping
    assert inspection.bytes == stored
    assert inspection.bits_per_weight == 8 * stored / inspection.parameters
    assert 3 < inspection.bits_per_quantized_weight < inspection.bits_per_weight


def test_kinds_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path, CONFIG)
    inspection = inspect_folder(tmp_path)
    kinds = {kind.name: kind for kind in inspection.kinds}
    down = kinds["model.layers.*.mlp.experts.*.down_proj"]
    # [48, 24] in 3 bits: 9 bytes of indices, 8 entries and a step of 2 bytes per row; 5 experts in each of 2 layers.
    assert (down.layers, down.count, down.shape, down.bytes) == ((1, 2), 10, (48, 24), 10 * 48 * (9 + 8 + 2))
    assert down.scheme == Scheme(bits=3)
    assert kinds["model.layers.*.self_attn.o_proj"].scheme == Scheme(bits=4, group_size=4, activation_bits=16)
    assert kinds["model.layers.*.mlp.gate_proj"].layers == (0,)
    for name in ("lm_head", "model.embed_tokens", "model.layers.*.mlp.gate", "model.norm"):
        assert (kinds[name].scheme, kinds[name].dtype) == (None, "float32")
    first, *_, last = kinds
    assert (first, last) == ("model.embed_tokens", "lm_head")


def test_provenance_and_rendering(tmp_path: Path) -> None:
    quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path, CONFIG)
    assert inspect_folder(tmp_path).provenance == {}
    provenance = {"source": {"name": "teacher", "files": {"a": "b"}}, "versions": {"torch": "2.13"}}
    (tmp_path / "codequant.json").write_text(json.dumps(provenance))
    inspection = inspect_folder(tmp_path)
    assert json.loads(json.dumps(inspection.to_dict()))["provenance"] == provenance
    console = Console(width=140)
    with console.capture() as capture:
        console.print(render(inspection))
    lines = capture.get().splitlines()
    (down,) = [" ".join(line.split()) for line in lines if ".experts.*.down_proj" in line]
    assert down == "model.layers.*.mlp.experts.*.down_proj 1-2 10 48 x 24 3 bits per row 8 bits 9.1 kB"
    assert "source: name teacher" in lines and "versions: torch 2.13" in lines


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        inspect_folder(tmp_path / "absent")
    quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path, CONFIG)
    (tmp_path / "codequant.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        inspect_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=r"model\.safetensors"):
        inspect_folder(tmp_path)
