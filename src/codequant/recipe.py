"""Recipes: every choice of a run, one frozen model per stage, validated before any work starts.

A recipe is a YAML file (or the name of a bundled one); unknown keys are errors. `--set stage.key=value` overrides one
field. The recipe that was used is saved inside the output.
"""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codequant.errors import InputError

BUNDLED = files("codequant") / "recipes"

Bits = Literal[2, 3, 4]
ActivationBits = Literal[4, 8, 16]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Stage):
    windows: int = Field(64, gt=0, description="token windows, drawn from different documents")
    length: int = Field(512, gt=1, description="tokens per window")
    windows_per_unit: int = Field(8, gt=0, description="windows that are in memory at once")
    seed: int = 0


class Rotation(Stage):
    method: Literal["learned", "none"] = "learned"
    start: Literal["aligned", "hadamard", "random"] = Field(
        "aligned",
        description="a Hadamard matrix that sends the outlier direction to all ones; baselines for comparison",
    )
    loss: Literal["range", "squared-error"] = Field("range", description="of cached activations; baseline: their error")
    steps: int = Field(300, ge=0, description="0: the start itself, no training")
    learning_rate: float = Field(2e-3, gt=0)
    batch: int = Field(3072, gt=0, description="cached activations per step, all sites together")
    samples: int = Field(131072, gt=0, description="cached activations, all sites together")
    heads: bool = Field(True, description="rotate value heads too (R2, a Hadamard matrix folded into v and o)")
    seed: int = 0


class Permutation(Stage):
    enabled: bool = Field(True, description="order input channels of o and down where they are quantized in groups")


class Weights(Stage):
    bits: Bits = 4
    target_bits: float | None = Field(
        None,
        ge=2,
        le=4,
        description="average over all quantized matrices: experts get 2, 3 or 4 bits by what those cost the model, "
        "other matrices `bits`",
    )
    group_size: int = Field(-1, description="input channels that share a codebook; -1: a whole row")
    method: Literal["hessian", "weighted", "kmeans", "rtn"] = "hessian"
    coverage: Literal["all", "normed-inputs"] = Field(
        "all", description="normed-inputs: only matrices that read the normed residual (the paper's q, k, v, gate, up)"
    )
    inputs: Literal["quantized", "source"] = Field(
        "quantized",
        description="what a layer is calibrated on: the quantized model's hidden states, layer after layer, or the "
        "source model's, which lets all layers be worked on at once",
    )
    router: bool = Field(False, description="quantize the router too")
    rounds: int = Field(2, ge=0, description="rounds of least-squares centroids and coordinate descent")
    sweeps: int = Field(3, ge=0, description="coordinate-descent sweeps per round")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a fraction of its mean")
    correction: float = Field(0.5, ge=0, le=1, description="how far targets move to make up for the quantized prefix")
    all_tokens: Fraction = Field(0.1, description="share of the all-token Hessian mixed into every expert's own")
    min_expert_tokens: int = Field(
        128, ge=0, description="experts that see fewer tokens are calibrated with all tokens"
    )


class Activations(Stage):
    bits: ActivationBits = 8
    clip: Fraction = Field(1.0, description="per-token range is scaled by this, inputs that come from a norm")
    inner_bits: ActivationBits | None = Field(None, description="inputs of o and down; default: bits")
    inner_clip: Fraction | None = Field(None, description="likewise; default: clip")
    hadamard: bool = Field(False, description="online Hadamard transform before down")


class FineTuning(Stage):
    epochs: int = Field(0, ge=0, description="passes over the windows, at most, for each block; 0 skips the stage")
    learning_rate: float = Field(3e-3, gt=0, description="relative to the size of a row's centroids")
    patience: int = Field(2, ge=1, description="epochs without a better held-out loss before giving up")
    router_weight: float = Field(1.0, ge=0, description="lambda of the router KL (paper: 1)")
    held_out: Fraction = Field(0.25, description="share of the windows that decides whether the result is kept")


class Recipe(Stage):
    name: str = "custom"
    calibration: Calibration = Calibration()
    rotation: Rotation = Rotation()
    permutation: Permutation = Permutation()
    weights: Weights = Weights()
    activations: Activations = Activations()
    finetuning: FineTuning = FineTuning()


def bundled_recipes() -> list[str]:
    return sorted(Path(entry.name).stem for entry in BUNDLED.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A bundled recipe by name, or a YAML file, with `key=value` overrides applied. Raises InputError."""
    bundled = BUNDLED / f"{name_or_file}.yaml"
    if bundled.is_file():
        text, where = bundled.read_text(), str(name_or_file)
    elif Path(name_or_file).is_file():
        text, where = Path(name_or_file).read_text(), Path(name_or_file).name
    else:
        raise InputError(
            f"recipe: {str(name_or_file)!r}, expected a YAML file or one of {', '.join(bundled_recipes())}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {where}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe {where}: {type(values).__name__}, expected a mapping of stages")
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set: {override!r}, expected key=value, for example weights.bits=3")
        *stages, leaf = key.split(".")
        target: Any = values
        for stage in stages:
            target = target.setdefault(stage, {})
            if not isinstance(target, dict):
                raise InputError(f"--set: {key!r}, expected stage.key, for example weights.bits")
        target[leaf] = yaml.safe_load(value)
    return parse_recipe(values, where)


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate a mapping. Raises InputError with one line: the key, its value and what was expected."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"recipe {where}: unknown key {key!r}{_suggestion(key)}") from error
        raise InputError(f"recipe {where}: {key}: {first['input']!r}, {first['msg'].lower()}") from error


def _suggestion(key: str) -> str:
    known = [
        f"{stage}.{leaf}" if leaf else stage
        for stage, info in Recipe.model_fields.items()
        for leaf in ["", *getattr(info.annotation, "model_fields", {})]
    ]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if key.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    return f", did you mean {near[0]!r}?" if near else f", expected one of {', '.join(Recipe.model_fields)}"
