"""A folder that is not whole never loads: each defect is one line that names what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import quantize_rtn_checkpoint, random_model, random_tokens, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import codequant
from codequant.bench.cpu import forget
from codequant.checkpoint_names import skeleton
from codequant.errors import InputError, VerificationError
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.runtime import read_ahead
from codequant.verification import INDEX, WEIGHTS, check_tensors, expected_tensors

STEP = "model.layers.1.block_sparse_moe.experts.2.w3.weight_step"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    quantize_rtn_checkpoint(random_model("mixtral"), tmp_path, QuantizationConfig(Scheme(activation_bits=16)))
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    quantize_rtn_checkpoint(random_model("mixtral"), tmp_path, QuantizationConfig(), shards=2)
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder, error, message):
    for load in (check_tensors, codequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(error, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(STEP), rf"^{STEP}: missing, expected float16 \[40, 1\]"),
        (lambda t: t.pop("model.norm.weight"), r"^model\.norm\.weight: missing, expected float \[32\]"),
        (lambda t: t.update({"x.weight_packed": torch.zeros(2)}), r"^x\.weight_packed: unexpected tensor \(1 in all\)"),
        (lambda t: t.update({STEP: t[STEP][:-1].clone()}), rf"^{STEP}: float16 \[39, 1\], expected float16 \[40, 1\]"),
        (lambda t: t.update({STEP: t[STEP].float()}), rf"^{STEP}: float32 \[40, 1\], expected float16"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}),
            r"^lm_head\.weight: int32 .*expected float",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            r"type F8_E4M3, expected",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, message):
    edit(folder, change)
    assert_refused(folder, VerificationError, message)


def test_a_truncated_file_is_named(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    assert_refused(folder, VerificationError, rf"^{WEIGHTS}: truncated or damaged")


def test_a_tensor_in_two_shards_is_named(sharded):
    first = load_file(sharded / "model-00001-of-00002.safetensors")
    name = sorted(first)[0]
    save_file(load_file(sharded / SHARD) | {name: first[name]}, sharded / SHARD, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=f"^{name}: found again in {SHARD}"):
        check_tensors(sharded)


def point_shard_to(folder, name):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {t: name if f == SHARD else f for t, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARD).unlink()
    with pytest.raises(VerificationError, match=f"^{SHARD}: missing weight file"):
        codequant.load(sharded)


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_leaves_the_folder_is_refused(sharded, absolute):
    outside = sharded.parent / "outside.safetensors"
    (sharded / SHARD).rename(outside)
    point_shard_to(sharded, str(outside) if absolute else "../outside.safetensors")
    with pytest.raises(InputError, match=r"outside\.safetensors: lies outside"):
        codequant.load(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded):
    outside = sharded.parent / "outside.safetensors"
    (sharded / SHARD).rename(outside)
    (sharded / SHARD).symlink_to(outside)
    with pytest.raises(InputError, match=f"^{SHARD}: lies outside"):
        codequant.load(sharded)


def test_the_links_of_a_hub_cache_are_followed(sharded):
    snapshot = sharded / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    (sharded / "blobs").mkdir()
    for file in [f for f in sharded.iterdir() if f.is_file()]:
        file.rename(sharded / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    check_tensors(snapshot)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match="weight_map"):
        codequant.load(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(format=2), r"^format: 2, expected 1"),
        (lambda c: c["quantization_config"].update(bit=3), r"unknown key 'bit'"),
        (lambda c: c["quantization_config"].update(bits=5), r"^bits: 5, expected one of"),
        (lambda c: c["quantization_config"].update(group_size=7), r"self_attn\.q_proj: group_size: 7, expected"),
        (lambda c: c["quantization_config"].update(overrides=[{"bits": 3}]), r"^overrides\[0\]: .* 'modules'"),
    ],
)
def test_a_wrong_configuration_is_named(folder, change, message):
    edit_config(folder, change)
    assert_refused(folder, InputError, message)


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        codequant.load(tmp_path / "nowhere")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        codequant.load(empty)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"neither {WEIGHTS} nor"):
        codequant.load(folder)
    edit_config(folder, lambda c: c.pop("quantization_config"))
    with pytest.raises(InputError, match="no quantization_config"):
        codequant.load(folder)


def test_a_folder_without_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        codequant.load(folder)


def test_only_the_causal_language_model_loads(folder):
    with pytest.raises(InputError, match=r"^MixtralModel: expected \['MixtralForCausalLM'\]"):
        AutoModel.from_pretrained(folder)


def test_offloading_is_refused(folder):
    with pytest.raises(InputError, match="device_map: offloads"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_what_the_model_leaves_out_may_be_there(tmp_path):
    """DeepSeek-V3 checkpoints carry a multi-token-prediction layer that the model ignores as it loads."""
    model = random_model("deepseek_v2")
    quantize_rtn_checkpoint(model, tmp_path, QuantizationConfig())
    edit(tmp_path, lambda t: t.update({"model.layers.61.eh_proj.weight": torch.zeros(2)}))
    with pytest.raises(VerificationError, match=r"model\.layers\.61\.eh_proj\.weight: unexpected"):
        check_tensors(tmp_path)
    patterns = type(model)._keys_to_ignore_on_load_unexpected
    type(model)._keys_to_ignore_on_load_unexpected = [r"model\.layers\.61.*"]
    try:
        check_tensors(tmp_path)
        codequant.load(tmp_path)
    finally:
        type(model)._keys_to_ignore_on_load_unexpected = patterns


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_quantized_takes_the_asked_type(stored, dtype, tmp_path):
    config = QuantizationConfig(ignore=("*.gate", "*.w2", "*.layers.1.*", "lm_head"))  # renamed and merged ones too
    quantize_rtn_checkpoint(random_model("mixtral", dtype=stored), tmp_path, config)
    model, _ = codequant.load(tmp_path, dtype=dtype)
    found = {t.dtype for name, t in model.state_dict().items() if not name.endswith(("packed", "codebook", "step"))}
    assert found == {dtype}
    with torch.no_grad():
        assert bool(model(random_tokens(model)).logits.isfinite().all())


def cached(file):
    """Whether the system has all of a file in memory."""
    with file.open("rb", buffering=0) as handle:
        try:
            return os.preadv(handle.fileno(), [bytearray(file.stat().st_size)], 0, os.RWF_NOWAIT) == file.stat().st_size
        except BlockingIOError:
            return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is read ahead")
def test_files_are_read_ahead(tmp_path):
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(bytes(2**22 + 1))
    forget(files)
    if any(map(cached, files)):
        pytest.skip("this file system lives in memory")
    read_ahead.read_ahead(files).join()
    assert all(map(cached, files))
    read_ahead.read_ahead([tmp_path / "nowhere", *files]).join()  # only a hint


def test_weights_are_read_ahead_once_the_folder_is_whole(sharded, monkeypatch):
    asked = []
    monkeypatch.setattr(read_ahead, "read_ahead", asked.extend)
    codequant.load(sharded)
    assert asked == sorted(sharded.glob("*.safetensors"))
    asked.clear()
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[:-1])
    with pytest.raises(VerificationError):
        AutoModelForCausalLM.from_pretrained(sharded)
    assert not asked


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_files_of_repacked_weights_leave_memory(tmp_path):
    config = QuantizationConfig(ignore=("*.gate", "lm_head"))
    quantize_rtn_checkpoint(random_model("mixtral"), tmp_path, config, shards=6)
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    model, _ = codequant.load(tmp_path, dtype=torch.float32)  # as in the files: another type takes a copy anyway
    with torch.no_grad():
        model(random_tokens(model))
    maps = Path("/proc/self/maps").read_text()
    mapped = {name for name in files.values() if f"{tmp_path}/{name}" in maps}
    assert mapped == {files["model.embed_tokens.weight"], files["lm_head.weight"]} < set(files.values())


def test_expected_tensors_of_fused_experts():
    """GPT-OSS keeps experts fused in its files, input channels first: the format has output channels first."""
    expected = expected_tensors(skeleton(tiny_config("gpt_oss")), QuantizationConfig(Scheme(bits=3, group_size=8)))
    prefix = "model.layers.0.mlp.experts."
    assert str(expected[f"{prefix}gate_up_proj_packed"]) == "uint8 [4, 48, 18]"  # [E, 2M, 48 * 3 / 8]
    assert str(expected[f"{prefix}gate_up_proj_codebook"]) == "int8 [4, 48, 6, 8]"
    assert str(expected[f"{prefix}gate_up_proj_bias"]) == "float [4, 48]"
    assert f"{prefix}gate_up_proj" not in expected


def run_python(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


def test_without_codequant_transformers_gives_random_weights(folder):
    """The trap that the documentation warns of. Should transformers refuse one day, the warning can go."""
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
if len(sys.argv) > 2:
    import codequant
loads = [AutoModelForCausalLM.from_pretrained(sys.argv[1]) for _ in range(2)]
with torch.no_grad():
    a, b = (m(torch.tensor([[3, 4, 5]])).logits for m in loads)
print(torch.equal(a, b), "codequant" in str(type(loads[0].model.layers[0].self_attn.q_proj)))
"""
    trap = run_python(script, folder)
    assert trap.stdout.split() == ["False", "False"] and "MISSING" in trap.stderr, trap.stderr
    late = run_python(script, folder, "import codequant")
    assert late.stdout.split() == ["True", "True"], late.stderr


def test_import_is_cheap_and_still_registers(folder):
    script = """
import sys, codequant
print(bool({"torch", "transformers", "numpy"} & set(sys.modules)))
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("codequant" in AUTO_QUANTIZER_MAPPING)
"""
    done = run_python(script, folder)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_tokenizer_comes_with_the_model(folder):
    _, tokenizer = codequant.load(folder)
    assert tokenizer("w5 w9").input_ids == AutoTokenizer.from_pretrained(folder)("w5 w9").input_ids == [5, 9]
