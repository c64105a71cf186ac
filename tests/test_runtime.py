"""Quantized modules compute what a plain model of the dequantized weights and fake-quantized inputs computes."""

import copy
import importlib
import threading
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, quantize_rtn_checkpoint, random_model, random_tokens, round_to_nearest
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import codequant
from codequant import kernels, packing
from codequant.errors import InputError
from codequant.hadamard import hadamard_transform
from codequant.kernels import reference
from codequant.kernels.reference import fake_quantize
from codequant.packing import PackedWeight
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.runtime import modules
from codequant.runtime.modules import CodebookExperts, CodebookLinear, CodebookWeight, Part

U = 2.0**-24  # unit roundoff of float32
A16 = Scheme(activation_bits=16)
WIDEST = 64  # no product in the tiny models sums more terms
DEPTH = 3 * 6  # layers times products in sequence in each


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_files(first, second):
    before, after = tensors_of(first), tensors_of(second)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def assert_same_logits(model, plain):
    tokens = random_tokens(plain)
    with torch.no_grad():
        expected, found = plain(tokens).logits, model(tokens).logits
    # Each product rounds its sum of at most WIDEST terms, and no norm or activation amplifies a relative error by much.
    assert float((found - expected).norm() / expected.norm()) < DEPTH * WIDEST * U


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_activations_give_the_logits_of_the_dequantized_model(family, tmp_path):
    plain = quantize_rtn_checkpoint(random_model(family), tmp_path / "q", QuantizationConfig(A16), shards=3)
    model, tokenizer = codequant.load(tmp_path / "q")
    assert_same_logits(model, plain)
    prompt = tokenizer("w5 w9 w31", return_tensors="pt")
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert model.generate(**prompt, **arguments).tolist() == plain.generate(**prompt, **arguments).tolist()
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_files(tmp_path / "q", tmp_path / "again")
    assert_same_logits(load(tmp_path / "again"), plain)


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_equals_fake_quantized_activations(family, activation_bits, tmp_path):
    """Module by module on the quantized model's own inputs, because a last-bit difference may move an activation to the
    next level and then every later one."""
    clip = 0.9
    config = QuantizationConfig(Scheme(activation_bits=activation_bits, activation_clip=clip, group_size=4))
    plain = quantize_rtn_checkpoint(random_model(family), tmp_path, config)
    model = load(tmp_path)
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, CodebookLinear | CodebookExperts | CodebookWeight):
            module.register_forward_hook(lambda _, args, output, name=name: calls.update({name: (args, output)}))
    with torch.no_grad():
        model(random_tokens(model))
    kinds = {type(model.get_submodule(name)).__name__ for name in calls}
    assert {"CodebookLinear", "CodebookExperts"} < kinds and len(kinds) == 3  # the third is the family's router
    levels = 2**activation_bits - 1
    for name, (args, output) in calls.items():
        module = plain.get_submodule(name)
        x = fake_quantize(args[0], activation_bits, clip)
        with torch.no_grad():
            if hasattr(module, "down_proj"):
                plain.config._experts_implementation = "batched_mm"  # goes through _apply_gate for every family
                gate, ranges = module._apply_gate, []

                def quantized_gate(gate_up, gate=gate, ranges=ranges):
                    hidden = gate(gate_up)
                    ranges.append(float((hidden.amax(-1) - hidden.amin(-1)).max()))
                    return fake_quantize(hidden, activation_bits, clip)

                module._apply_gate = quantized_gate
                expected = module(x, *args[1:])
                one_level = ranges[0] / levels * float(module.down_proj.abs().max())
            else:
                expected, one_level = module(x), 0.0
            if isinstance(expected, tuple):  # a router: its logits come first
                expected, output = expected[0], output[0]
        rounding = 4 * WIDEST * U * float(expected.abs().max() + x.abs().max())
        assert float((output - expected).abs().max()) < rounding + one_level, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_a_gpu_gives_the_reference_s_logits_through_its_own_kernels(family, tmp_path, monkeypatch):
    quantize_rtn_checkpoint(random_model(family), tmp_path, QuantizationConfig(A16))
    model, _ = codequant.load(tmp_path, dtype=torch.float32, device="cuda")
    tokens = random_tokens(model).to("cuda")
    assert kernels.backend("cuda").__name__.endswith("triton")
    with torch.no_grad():
        found = model(tokens).logits
    monkeypatch.setenv("CODEQUANT_BACKEND", "reference")
    expected, _ = codequant.load(tmp_path, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        difference = found - expected(tokens).logits
    # 16-bit activations are fixed-point numbers there, of 2**-16 of their token's largest magnitude.
    assert float(difference.norm() / found.norm()) < DEPTH * 2.0**-16 * WIDEST**0.5


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_every_backend_offers_what_the_runtime_asks_for(name):
    if name == "triton":
        pytest.importorskip("triton", reason="needs triton: pip install triton==3.6.0 (Linux)")
    module = importlib.import_module(f"codequant.kernels.{name}")
    missing = [asked for asked in vars(kernels.Backend) if not asked.startswith("_") and not hasattr(module, asked)]
    assert not missing


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "phimoe"])
def test_hadamard_before_every_product(family, tmp_path):
    config = QuantizationConfig(Scheme(activation_bits=16, hadamard=True))
    plain = quantize_rtn_checkpoint(random_model(family), tmp_path, config)
    assert_same_logits(load(tmp_path), plain)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize(
    "ignore",
    [
        ("*.down_proj", "*.w2"),  # only gate and up of the experts
        ("*.layers.1.*",),  # a layer that stays plain beside one that does not
        ("*.mlp.gate", "*.router", "*_proj"),  # attention and routers plain, w1..w3 of Mixtral not
    ],
)
def test_what_is_ignored_stays_plain(family, ignore, tmp_path):
    plain = quantize_rtn_checkpoint(random_model(family), tmp_path / "q", QuantizationConfig(A16, ignore=ignore))
    model = load(tmp_path / "q")
    assert_same_logits(model, plain)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")


def test_experts_of_one_layer_may_have_different_bits(tmp_path):
    overrides = {
        "*.experts.1.*": {"bits": 2},
        "*.experts.*.up_proj": {"bits": 3},
        "*.layers.2.*.experts.*": {"bits": 2},
    }
    config = QuantizationConfig(Scheme(activation_bits=16, group_size=8), overrides=overrides)
    plain = quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path / "q", config)
    model = load(tmp_path / "q")
    assert_same_logits(model, plain)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")
    prepared, kernels = model.model.layers[1].mlp.experts.prepared()
    assert kernels.restore(prepared).gate_up.bits == 4  # one block, as wide as its widest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"*.experts.3.up_proj": {"activation_bits": 4}}, r"experts\.3\.up_proj: .*activation_bits=4.*expected"),
        ({"*.experts.2.gate_proj": {"group_size": 6}}, r"experts\.2\.gate_proj: .*group_size=6.*expected"),
    ],
)
def test_experts_of_one_layer_must_share_the_rest(override, message, tmp_path):
    quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path, QuantizationConfig(overrides=override))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_experts_of_one_layer_are_ignored_together(tmp_path):
    config = QuantizationConfig(ignore=("*.experts.3.gate_proj",))
    quantize_rtn_checkpoint(random_model("qwen3_moe"), tmp_path, config)
    with pytest.raises(InputError, match=r"experts\.3\.gate_proj: ignored, but .* is quantized"):
        load(tmp_path)


class ScramblingBackend:
    """The reference's results from a prepared form that is useless as it is, and that cannot be copied."""

    def unavailable(self, device_type):
        return None

    def prepare_linear(self, weight):
        scrambled = PackedWeight(~weight.packed, weight.codebook.flip(-1), weight.step.clone(), weight.in_features)
        return scrambled, threading.Lock()

    def prepare_experts(self, experts):
        experts = reference.prepare_experts(experts)
        return experts, self.prepare_linear(experts.gate_up), self.prepare_linear(experts.down)

    def restore(self, prepared):
        if len(prepared) == 2:
            return self.prepare_linear(prepared[0])[0]
        experts, gate_up, down = prepared
        return replace(experts, gate_up=self.restore(gate_up), down=self.restore(down))

    def linear(self, x, prepared, *args):
        return reference.linear(x, self.restore(prepared), *args)

    def experts(self, x, index, weights, prepared):
        return reference.experts(x, index, weights, self.restore(prepared))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_only_the_prepared_form_is_kept_and_the_format_comes_back(family, tmp_path, monkeypatch):
    monkeypatch.setattr(modules, "backend", lambda device_type: ScramblingBackend())
    plain = quantize_rtn_checkpoint(random_model(family), tmp_path / "q", QuantizationConfig(A16))
    model = load(tmp_path / "q")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same_logits(model, plain)
    held = [m for m in model.modules() if isinstance(m, CodebookLinear | CodebookExperts)]
    assert held and not any(list(m.buffers(recurse=False)) for m in held)
    after = model.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert_same_logits(copy.deepcopy(model), plain)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")
    assert_same_logits(model, plain)
    model.to(torch.bfloat16)  # must not touch the format's float16 steps
    assert all(list(m.buffers(recurse=False)) for m in held)  # what was prepared may belong to another device
    moved = model.state_dict()
    assert all(torch.equal(before[name], moved[name]) for name in before if name.endswith(packing.SUFFIXES))
    assert moved["model.embed_tokens.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        assert model(random_tokens(model)).logits.dtype == torch.bfloat16


class Experts(nn.Module):
    """Fused experts of every layout; the forward is the definition that the flags describe."""

    def __init__(self, config):
        super().__init__()
        E, I, M, O = config
        wide = 2 * M if self.gated else M
        name = "gate_up_proj" if self.gated else "up_proj"
        self.num_experts, self.act_fn = E, ACT2FN["silu"]
        shapes = {name: (E, wide, I), "down_proj": (E, O, M)}
        for parameter, shape in shapes.items():
            shape = (shape[0], shape[2], shape[1]) if self.transposed else shape
            self.register_parameter(parameter, nn.Parameter(torch.randn(shape)))
            if self.biased:
                self.register_parameter(f"{parameter}_bias", nn.Parameter(torch.randn(E, shapes[parameter][1])))

    def forward(self, x, index, weights):
        name = "gate_up_proj" if self.gated else "up_proj"
        y = torch.zeros(len(x), index.shape[1], self.output_size(), dtype=x.dtype)
        for t, k in ((t, k) for t in range(len(x)) for k in range(index.shape[1])):
            e = int(index[t, k])
            hidden = self.product(name, e, x[t])
            if not self.gated:
                hidden = self.act_fn(hidden)
            elif self.concatenated:
                gate, up = hidden.chunk(2)
                hidden = self.act_fn(gate) * up
            else:
                hidden = self._apply_gate(hidden)
            y[t, k] = self.product("down_proj", e, hidden) * weights[t, k]
        return y.sum(1)

    def output_size(self):
        return self.down_proj.shape[2 if self.transposed else 1]

    def product(self, name, e, x):
        weight = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.biased else 0
        return (x @ weight if self.transposed else weight @ x) + bias


def experts_class(concatenated, transposed, biased, gated):
    attributes = {"concatenated": concatenated, "transposed": transposed, "biased": biased, "gated": gated}
    if gated and not concatenated:
        attributes["_apply_gate"] = lambda self, h: self.act_fn(h[..., ::2]).clamp(max=1.5) * (h[..., 1::2] + 1)
    cls = type("AllExperts", (Experts,), attributes)
    return use_experts_implementation(
        cls, is_concatenated=concatenated, is_transposed=transposed, has_bias=biased, has_gate=gated
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("quantized", ["both", "gate_up", "down"])
def test_experts_of_every_layout(concatenated, transposed, biased, gated, quantized):
    torch.manual_seed(0)
    E, I, M, O, T = 3, 10, 6, 7, 9
    original = experts_class(concatenated, transposed, biased, gated)((E, I, M, O))
    parts, values = {}, {}
    for name, parameter in original.named_parameters():
        plain = name.endswith("bias") or {"gate_up": name == "down_proj", "down": name != "down_proj"}.get(quantized)
        parts[name] = [Part(name, name, tuple(parameter.shape), True, None if plain else A16)]
        values[name] = parameter.data
        if not plain:
            packed = round_to_nearest(parameter.data.mT if transposed else parameter.data, 4, -1)
            del values[name]
            values |= {f"{name}_{suffix}": getattr(packed, suffix) for suffix in packing.SUFFIXES}
            parameter.data = packing.unpack(packed).mT if transposed else packing.unpack(packed)
    experts = CodebookExperts(original, parts, torch.float32)
    experts.load_state_dict(values)
    x = torch.randn(T, I)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    weights = torch.rand(T, 2)
    with torch.no_grad():
        expected, found = Experts.forward(original, x, index, weights), experts(x, index, weights)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * (I + M) * U * scale)
    restored = experts.state_dict()
    assert set(restored) == set(values) and all(torch.equal(restored[name], values[name]) for name in values)


def test_a_norm_after_the_experts_is_refused():
    original = experts_class(True, False, False, True)((2, 4, 4, 4))
    original.has_post_expert_norm = True
    parts = {
        name: [Part(name, f"layer.{name}", tuple(parameter.shape), True, A16)]
        for name, parameter in original.named_parameters()
    }
    with pytest.raises(InputError, match=r"layer\.down_proj: experts with a norm"):
        CodebookExperts(original, parts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_odd_shape_with_group_and_hadamard(dtype):
    torch.manual_seed(0)
    I, O = 36, 5
    scheme = Scheme(bits=3, group_size=9, activation_bits=8, hadamard=True)
    packed = round_to_nearest(torch.randn(O, I), scheme.bits, scheme.group_size)
    linear = CodebookLinear(I, O, True, scheme, dtype)
    bias = torch.randn(O).to(dtype)
    linear.load_state_dict(
        {"bias": bias} | {f"weight_{suffix}": getattr(packed, suffix) for suffix in packing.SUFFIXES}
    )
    x = torch.randn(2, 3, I).to(dtype)
    with torch.no_grad():
        found = linear(x)
    assert found.dtype == dtype and found.shape == (2, 3, O)
    assert torch.equal(linear.weight, packing.unpack(packed).to(dtype))  # some models read it
    expected = fake_quantize(hadamard_transform(x), 8) @ packing.unpack(packed).T + bias.float()
    atol = 4 * I * U * float(expected.abs().max())
    rtol = 0 if dtype == torch.float32 else 2.0**-8  # one rounding of the result
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)
