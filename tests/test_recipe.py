from pathlib import Path

import pytest
import yaml
from sources import write_source

from codequant.errors import InputError
from codequant.quantization_config import QuantizationConfig
from codequant.recipe import Recipe, bundled_recipes, load_recipe
from codequant.schemes import matrices, quantization_config
from codequant.source import SourceModel


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_load_and_carry_their_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_a_recipe_round_trips_through_yaml(tmp_path: Path) -> None:
    recipe = load_recipe("w4a4-full", ["weights.bits=3", "rotation.steps=0"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.weights.bits == 3 and recipe.rotation.steps == 0 and recipe.activations.hadamard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: {bits: 4", "not valid YAML"),
        ("- 1", "list, expected a mapping of stages"),
        ("weights: {group: 3}", "unknown key 'weights.group', did you mean 'weights.group_size'?"),
        ("calibration: {windows: 0}", "calibration.windows: 0, input should be greater than 0"),
        ("activations: {clip: 1.5}", "activations.clip: 1.5"),
    ],
)
def test_a_bad_recipe_gets_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(tmp_path / "bad.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


def quantized_modules(family: str, tmp_path: Path, recipe: Recipe) -> tuple[set[str], set[str], QuantizationConfig]:
    """(quantized, left alone) modules of layer 1, experts other than 0 left out."""
    source = SourceModel(write_source(family, tmp_path / "source"))
    config = quantization_config(source, recipe)
    names = {m.module for m in matrices(source) if ".layers.1." in m.module and ".experts." not in m.module}
    names |= {m.module for m in matrices(source) if ".layers.1." in m.module and ".experts.0." in m.module}
    short = {name: name.partition(".layers.1.")[2] for name in names}
    quantized = {short[name] for name in names if config.scheme(name) is not None}
    return quantized, set(short.values()) - quantized, config


def test_default_covers_everything_but_the_router(tmp_path: Path) -> None:
    _, left, config = quantized_modules("qwen2_moe", tmp_path, load_recipe("w4a8"))
    assert left == {"mlp.gate", "mlp.shared_expert_gate"}
    assert config.scheme("lm_head") is None


def test_paper_covers_what_reads_the_normed_residual(tmp_path: Path) -> None:
    quantized, left, _ = quantized_modules("deepseek_v2", tmp_path, load_recipe("paper"))
    assert quantized == {
        *("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate"),
        *("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        *("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"),
    }
    assert {"self_attn.o_proj", "self_attn.kv_b_proj", "mlp.experts.0.down_proj"} <= left


def test_inner_inputs_have_their_own_bits_and_the_transform(tmp_path: Path) -> None:
    recipe = load_recipe("w4a4-full", ["activations.inner_bits=8"])
    *_, config = quantized_modules("mixtral", tmp_path, recipe)
    down = config.scheme("model.layers.0.block_sparse_moe.experts.2.w2")
    gate = config.scheme("model.layers.0.block_sparse_moe.experts.2.w1")
    assert down is not None and gate is not None
    assert (down.activation_bits, down.activation_clip, down.hadamard) == (8, 0.8, True)
    assert (gate.activation_bits, gate.activation_clip, gate.hadamard) == (4, 0.9, False)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_the_page_lists_every_field_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "RECIPES.md").read_text(encoding="utf-8")
    for stage, info in Recipe.model_fields.items():
        for name, field in getattr(info.annotation, "model_fields", {}).items():
            row = f"| `{name}` | {field.default} | {field.description or ''} |"
            assert row in page.partition(f"### {stage}\n")[2].partition("###")[0], f"{stage}: expected {row}"
