"""The import arrows of CONTRIBUTING.md: what each top-level module or package of codequant may import of the others."""

import ast
from pathlib import Path

import pytest

import codequant

PACKAGE = Path(codequant.__file__).parent

FORMAT = {"errors", "packing", "quantization_config"}
MODEL = {"structure", "checkpoint_names"}  # what a model is made of
COMPUTE = {"native", "kernels", "hadamard"}
# A stage is one step of the recipe: pure functions over tensors. Stages never import one another.
STAGES = {"calibration", "discovery", "folding", "rotation", "permutation", "finetuning", "allocation"}
ALGORITHMS = {"clustering", "error_feedback"}  # numerical methods that stages are made of
# What is done with a finished folder.
TOOLS = {"evaluation", "generation", "inspection"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "packing": {"errors"},
    "quantization_config": {"errors", "packing"},
    "data": set(),
    "native": {"errors"},
    "hadamard": {"errors"},
    "kernels": {*FORMAT, *COMPUTE},
    "structure": set(),
    "checkpoint_names": {"errors"},
    "verification": {*FORMAT, "checkpoint_names", "store"},
    "runtime": {*FORMAT, *COMPUTE, "checkpoint_names", "verification"},
    **{algorithm: {*FORMAT, *COMPUTE} for algorithm in ALGORITHMS},
    **{stage: {*FORMAT, *MODEL, *COMPUTE, *ALGORITHMS} for stage in STAGES},
    **{tool: {*FORMAT, *MODEL, *COMPUTE, "verification", "runtime"} for tool in TOOLS},
    "corpora": {"errors", "calibration"},
    "tasks": {"errors"},
    "report": {*FORMAT, "inspection", "stages", "verification"},
    "stages": set(),
    # The pipeline, from its parts to the whole.
    "recipe": FORMAT,
    "store": {"errors"},
    "executor": {"errors", "store"},
    "source": {"errors", *MODEL, "discovery"},
    "schemes": {*FORMAT, "recipe", "source"},
    "working_layer": {"errors", *MODEL},
    "weight_quantization": {*FORMAT, *ALGORITHMS},
    "units": {
        *FORMAT, *MODEL, *COMPUTE, *ALGORITHMS, *STAGES,
        *("recipe", "store", "executor", "source", "schemes", "working_layer", "weight_quantization"),
    },
    "plan": {*FORMAT, "executor", "units"},
    "ray_executor": {"errors", "recipe", "store", "executor", "source", "units"},
    "writing": {*FORMAT, "recipe", "store", "source", "units"},
    # A finished folder in other engines.
    **{engine: {*FORMAT, *COMPUTE, "checkpoint_names", "verification", "source"} for engine in ("export", "serving")},
}  # fmt: skip
# Where everything comes together; only cli is imported by nobody.
EVERYTHING = {"__init__", "bench", "pipeline", "cli"}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(source: str) -> set[str]:
    """Units named by the import statements of a module, those inside functions included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import, expected an absolute one"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("codequant.")}


def arrows_that_are_wrong(unit: str, source: str) -> set[str]:
    if unit in EVERYTHING:
        return imported_units(source) & ({"cli"} if unit != "cli" else set())
    assert unit in MAY_IMPORT, f"{unit}: unknown unit; add its row to MAY_IMPORT in {Path(__file__).name}"
    return imported_units(source) - MAY_IMPORT[unit] - {unit}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_arrows(path: Path) -> None:
    wrong = arrows_that_are_wrong(unit_of(path), path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}, which its row in MAY_IMPORT does not allow"


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("packing", "import codequant.kernels.reference"),
        ("rotation", "from codequant.folding import fold_layer"),
        ("kernels", "def late():\n    from codequant import runtime"),
        ("pipeline", "from codequant.cli import main"),
    ],
)
def test_a_wrong_arrow_is_found(unit: str, source: str) -> None:
    assert arrows_that_are_wrong(unit, source)
