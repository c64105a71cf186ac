"""Exports hold the model they were made from: every tensor bit for bit in GGUF, rounded to bfloat16 in safetensors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from helpers import FAMILIES, quantize_rtn_checkpoint, random_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from codequant.checkpoint_names import parameter_sources
from codequant.errors import InputError, VerificationError
from codequant.export import bf16, export
from codequant.export.folder import QuantizedFolder
from codequant.export.gguf import halves_to_pairs, q8_0
from codequant.export.gguf_tokenizer import adds_space, pre_tokenizer_name, scores, vocabulary
from codequant.packing import PackedWeight, unpack
from codequant.quantization_config import QuantizationConfig, Scheme

IGNORE = ("lm_head", "*.gate")
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea 1851 times."

# Widths in blocks of 32, with different numbers of heads for queries and for keys.
COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "dtype": torch.float32,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_experts=12,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "mixtral": MixtralConfig(**COMMON, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
}
EXPERTS = {
    "qwen3_moe": ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Random, with activations near 1 and norm gains that are not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 * (parameter.ndim == 1), parameter.shape[-1] ** -0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def write_bpe_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


def write_sentencepiece_tokenizer(folder: Path) -> Tokenizer:
    """BPE with byte fallback, with every pair that makes a token, as converted SentencePiece models list them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=70, show_progress=False))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)[: 300 - len(special)]
    vocab = {token: i for i, token in enumerate([*special, *pieces])}
    merges = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


def quantized(
    folder: Path, family: str, quantization: QuantizationConfig | None = None, **changes: Any
) -> PreTrainedModel:
    """Write a quantized folder that GGUF can hold unless `changes` forbid it; returns the dequantized model."""
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    config.dtype = torch.float32
    quantization = quantization or QuantizationConfig(Scheme(), IGNORE)
    dequantized = quantize_rtn_checkpoint(model_of(config), folder, quantization, shards=3)
    write_bpe_tokenizer(folder)
    return dequantized


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("qwen3_moe", Scheme(bits=4)), ("qwen3_moe", Scheme(bits=3, group_size=32)), ("mixtral", Scheme(bits=2))],
)
def test_gguf_holds_every_weight_bit_for_bit(tmp_path: Path, family: str, scheme: Scheme) -> None:
    quantized(tmp_path / "q", family, QuantizationConfig(scheme, IGNORE))
    file = export(tmp_path / "q", tmp_path / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    stored = {name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for name, t in tensors.items()}

    model = QuantizedFolder(tmp_path / "q")
    weights = {name: model.read(name) for name in model.names}
    expected = {name: unpack(w) if isinstance(w, PackedWeight) else w for name, w in weights.items()}
    experts, projections = EXPERTS[family]
    E = model.config.num_local_experts
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(2):
        hf, blk = f"model.layers.{layer}", f"blk.{layer}"
        names |= {f"{hf}.self_attn.{x}_proj": f"{blk}.attn_{x}" for x in "qkv"}
        names |= {f"{hf}.self_attn.o_proj": f"{blk}.attn_output", f"{hf}.input_layernorm": f"{blk}.attn_norm"}
        names |= {f"{hf}.post_attention_layernorm": f"{blk}.ffn_norm"}
        names |= {f"{hf}.{experts.split('.')[0]}.gate": f"{blk}.ffn_gate_inp"}
        if family == "qwen3_moe":
            names |= {f"{hf}.self_attn.{x}_norm": f"{blk}.attn_{x}_norm" for x in "qk"}
        for projection, name in projections.items():
            stack = stored[f"{blk}.ffn_{projection}_exps.weight"]
            assert tensors[f"{blk}.ffn_{projection}_exps.weight"].tensor_type == GGMLQuantizationType.Q8_0
            for expert in range(E):
                assert torch.equal(stack[expert], expected[f"{hf}.{experts}.{expert}.{name}.weight"])
    assert len(tensors) == len(names) + 2 * 3
    for source, target in names.items():
        W = expected[f"{source}.weight"]
        if family == "mixtral" and source.endswith(("q_proj", "k_proj")):
            W = halves_to_pairs(W, 4 if source.endswith("q_proj") else 2)  # tested below
        assert torch.equal(stored[f"{target}.weight"], W), source
    assert tensors["blk.1.attn_v.weight"].tensor_type == GGMLQuantizationType.Q8_0
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == GGMLQuantizationType.F32


def test_pairs_of_channels_give_the_same_attention_scores() -> None:
    """Rotating neighbours of the reordered channels is rotating halves of the original ones."""
    H, D = 3, 16
    q, k = torch.randn(H * D, 1, dtype=torch.float64), torch.randn(H * D, 1, dtype=torch.float64)
    angle = torch.rand(H, D // 2, dtype=torch.float64)

    def rotate(a: torch.Tensor, b: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    def halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = x.view(H, 2, D // 2).unbind(1)
        return rotate(a, b, angle)

    def pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = halves_to_pairs(x, H).view(H, D // 2, 2).unbind(2)
        return rotate(a, b, angle)

    scores = (halves(q, angle) * halves(k, 2 * angle)).sum((0, 2))
    torch.testing.assert_close((pairs(q, angle) * pairs(k, 2 * angle)).sum((0, 2)), scores, rtol=1e-12, atol=1e-12)
    assert not torch.equal(halves_to_pairs(q, H), q)


def test_q8_0_keeps_subnormal_steps_and_extreme_entries() -> None:
    codebook = torch.tensor([[-127, -1, 0, 127]], dtype=torch.int8).expand(2, 1, 4)
    step = torch.tensor([[6e-8], [60000.0]], dtype=torch.float16)
    weight = PackedWeight(torch.randint(0, 256, (2, 16), dtype=torch.uint8), codebook, step, 64)
    blocks = q8_0(weight)
    assert blocks.shape == (2, 68)
    restored = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType.Q8_0))
    assert torch.equal(restored, unpack(weight))


def test_gguf_metadata(tmp_path: Path) -> None:
    quantized(tmp_path / "q", "mixtral")
    fields = GGUFReader(export(tmp_path / "q", tmp_path / "model.gguf", "gguf")).fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "llama"
    assert (values["llama.expert_count"], values["llama.expert_used_count"]) == (4, 2)
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert values["llama.rope.dimension_count"] == values["llama.attention.key_length"] == 32
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    tokens = values["tokenizer.ggml.tokens"]
    vocab = json.loads((tmp_path / "q" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == 300
    assert all(tokens[i] == text for text, i in vocab.items())
    assert values["tokenizer.ggml.eos_token_id"] == 0
    assert values["tokenizer.ggml.token_type"][0] == 3  # control


LLAMA_CPP = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 128, 1, 1
server = xllamacpp.Server(parameters)
for prompt in json.loads(sys.argv[2]):
    # The probabilities are those before the bias, which makes the answer a printable token: others have none.
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 300, "temperature": -1.0, "logit_bias": [["e", 1000]]}
    answer = server.handle_completions(request)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print("RESULT", json.dumps({entry["id"]: entry["logprob"] for entry in found}), flush=True)
"""


@pytest.mark.parametrize(
    ("family", "write_tokenizer"), [*zip(CONFIGS, (write_bpe_tokenizer, write_sentencepiece_tokenizer))]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, family: str, write_tokenizer: Callable[[Path], Tokenizer]) -> None:
    """From tokens, and from text, which shows that it tokenizes the same."""
    pytest.importorskip("xllamacpp")
    dequantized = quantized(tmp_path / "q", family)
    tokenizer = write_tokenizer(tmp_path / "q")
    file = export(tmp_path / "q", tmp_path / "model.gguf", "gguf")
    texts = ["I went to sea precisely 1851  times.", "don't say na\u00efve\nIshmael"]
    prompts = [list(range(3, 27)), *texts]
    command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(prompts), done.stderr[-2000:]
    for tokens, result in zip([prompts[0], *(tokenizer.encode(text).ids for text in texts)], results):
        found = torch.tensor([result[str(token)] for token in range(300)])
        with torch.no_grad():
            expected = dequantized(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        # llama.cpp rounds activations to 8 bits per 32 channels and keys and values to float16: a relative error of
        # about 1/500 in every product, which moves logits with a standard deviation near 1 by a few hundredths.
        assert (found - expected).abs().max() < 0.1
        assert expected.max() - expected.min() > 3


def sentencepiece(vocab: list[str], merges: list[str]) -> dict[str, Any]:
    return {"model": {"vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges}}


def test_scores_order_merges_as_ranks_do() -> None:
    vocab = ["a", "b", "ab", "aba", "bab"]
    good = sentencepiece(vocab, ["a b", "ab a", "b ab"])
    assert scores(good, [*vocab, "[PAD5]"]) == [-3, -3, 0, -1, -2, -3]
    with pytest.raises(InputError, match=r"\('b', 'ab'\) is not merged, but llama.cpp would merge it to 'bab'"):
        scores(sentencepiece([*vocab, "ba"], ["a b", "b a", "ab a", "a ba", "ba b"]), vocab)
    with pytest.raises(InputError, match="pairs of token 'aba' are merged at different ranks"):
        scores(sentencepiece([*vocab, "ba"], ["a b", "b a", "ab a", "b ab", "ba b", "a ba"]), vocab)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (normalizers.Replace(" ", "▁"), None, False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (normalizers.NFKC(), None, None),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=True), None),
    ],
)
def test_space_before_text(normalizer: Any, pre_tokenizer: Any, expected: bool | None) -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    values = json.loads(tokenizer.to_str())
    if expected is None:
        with pytest.raises(InputError, match=r"tokenizer\.json: normalizer"):
            adds_space(values)
    else:
        assert adds_space(values) == expected


@pytest.mark.parametrize(
    ("family", "quantization", "changes", "message"),
    [
        ("qwen3_moe", QuantizationConfig(Scheme(group_size=48), (*IGNORE, "*_proj"), {}), {}, None),
        ("qwen3_moe", QuantizationConfig(Scheme(), IGNORE, {"*.5.down_proj": {"hadamard": True}}), {}, "Hadamard"),
        ("qwen3_moe", QuantizationConfig(Scheme(group_size=16), IGNORE), {}, "16 columns share a codebook"),
        ("qwen3_moe", QuantizationConfig(Scheme(), (*IGNORE, "*.experts.3.*")), {}, r"experts\.3\.down_proj\.weight"),
        ("qwen3_moe", None, {"moe_intermediate_size": 40}, r"down_proj\.weight: 40 columns"),
        ("qwen3_moe", None, {"norm_topk_prob": False}, "norm_topk_prob: False"),
        ("qwen3_moe", None, {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]"),
        ("mixtral", None, {"sliding_window": 64}, "sliding_window: 64"),
        (
            "mixtral",
            None,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: 'linear'",
        ),
    ],
)
def test_gguf_names_what_it_cannot_hold(
    tmp_path: Path, family: str, quantization: QuantizationConfig | None, changes: dict[str, Any], message: str | None
) -> None:
    quantized(tmp_path / "q", family, quantization, **changes)
    if message is None:  # nothing is quantized: plain tensors are fine
        assert export(tmp_path / "q", tmp_path / "model.gguf", "gguf").is_file()
        return
    with pytest.raises(InputError, match=message):
        export(tmp_path / "q", tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_gguf_refuses_other_families(tmp_path: Path) -> None:
    quantize_rtn_checkpoint(random_model("olmoe"), tmp_path / "q", QuantizationConfig(Scheme(), IGNORE))
    with pytest.raises(InputError, match="model_type: 'olmoe'"):
        export(tmp_path / "q", tmp_path / "model.gguf", "gguf")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{**BYTE_LEVEL, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}], "smollm"),
        ([split(QWEN2), BYTE_LEVEL], "qwen2"),
        ([split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), BYTE_LEVEL], "llama-bpe"),
        ([split(r"\w+"), BYTE_LEVEL], None),
        ([{**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}], None),
        ([BYTE_LEVEL], None),
    ],
)
def test_splitting_by_name(steps: list[dict[str, Any]], name: str | None) -> None:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    tokenizer = {"model": {"type": "BPE"}, "pre_tokenizer": pre}
    if name is None:
        with pytest.raises(InputError, match="pre_tokenizer"):
            pre_tokenizer_name(tokenizer)
    else:
        assert pre_tokenizer_name(tokenizer) == name


def test_vocabulary_keeps_ids_and_fills_holes() -> None:
    tokenizer = {
        "model": {"vocab": {"a": 0, "b": 2}},
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 2, "content": "b", "special": False}],
    }
    tokens, types = vocabulary(tokenizer, 5)
    assert tokens == ["a", "[PAD1]", "b", "<s>", "[PAD4]"]
    assert [int(kind) for kind in types] == [1, 5, 4, 3, 5]
    with pytest.raises(InputError, match="'<s>' has id 3"):
        vocabulary(tokenizer, 3)


def test_gguf_refuses_other_tokenizers(tmp_path: Path) -> None:
    quantize_rtn_checkpoint(model_of(CONFIGS["mixtral"]), tmp_path / "q", QuantizationConfig(Scheme(), IGNORE))
    with pytest.raises(InputError, match="model WordLevel, expected BPE"):
        export(tmp_path / "q", tmp_path / "model.gguf", "gguf")


# --- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_the_dequantized_model(tmp_path: Path, family: str) -> None:
    overrides = {"*down_proj": {"hadamard": True}, "*o_proj": {"bits": 3, "group_size": 8}}
    if family == "phimoe":  # o_proj has a width of 48, and its down projection is called w2
        overrides |= {"*.w2": {"hadamard": True}}
    config = QuantizationConfig(Scheme(), IGNORE, overrides)
    dequantized = quantize_rtn_checkpoint(random_model(family), tmp_path / "q", config)
    out = export(tmp_path / "q", tmp_path / "out", "bf16")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    # One rounding to bfloat16, and to float32 in the product with H.
    expected = {name: value.float() for name, value in dequantized.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=2**-8, atol=1e-6)


def test_bf16_keeps_the_checkpoints_names_and_splits_into_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("mixtral")
    quantize_rtn_checkpoint(model, tmp_path / "q", QuantizationConfig(Scheme(), IGNORE))
    monkeypatch.setattr(bf16, "SHARD_BYTES", 10_000)
    out = export(tmp_path / "q", tmp_path / "out", "bf16")
    files = sorted(out.glob("*.safetensors"))
    found = {file.name: load_file(file) for file in files}
    assert len(files) > 3
    assert all(sum(t.nbytes for t in tensors.values()) <= 10_000 or len(tensors) == 1 for tensors in found.values())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in found.items() for name in tensors}
    names = {source.name for entries in parameter_sources(model).values() for source in entries}
    assert index["weight_map"].keys() == names
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names


# --- both ------------------------------------------------------------------------------------------------------------


def test_bad_requests_leave_nothing_behind(tmp_path: Path) -> None:
    quantized(tmp_path / "q", "mixtral")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="format: 'onnx'"):
        export(tmp_path / "q", tmp_path / "x", "onnx")
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path / "q", tmp_path / "q", "bf16")
    with pytest.raises(InputError, match="is no folder"):
        export(tmp_path / "q", tmp_path / "missing" / "x", "bf16")
    with pytest.raises(InputError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "x", "gguf")
    shard = tmp_path / "q" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for format in ("gguf", "bf16"):
        with pytest.raises(VerificationError, match=shard.name):
            export(tmp_path / "q", tmp_path / "x", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interrupted_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(tmp_path / "q", "mixtral")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("codequant.export.gguf.tensor_bytes", interrupt)
    monkeypatch.setattr("codequant.export.bf16.plain", interrupt)
    for format in ("gguf", "bf16"):
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / "q", tmp_path / "x", format)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
