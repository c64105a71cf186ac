"""`quantization_config` of an output folder's config.json: which module is quantized, and how.

    {"quant_method": "codequant", "format": 1, "bits": 4, "group_size": -1, "activation_bits": 8,
     "activation_clip": 1.0, "ignore": ["lm_head", "*.mlp.gate"],
     "overrides": [{"modules": "*.experts.*.down_proj", "activation_bits": 16}]}

`modules` is a pattern or a list of them. Patterns are shell globs (`*` also crosses dots) against the checkpoint's
module names, per expert (`model.layers.0.mlp.experts.3.down_proj`). A linear layer, router or expert matrix that no
`ignore` pattern matches is quantized; overrides are applied in order, later ones win (so they are a list: transformers
writes objects with sorted keys). Norms and embeddings are never quantized.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from typing import Any

from codequant.errors import InputError
from codequant.packing import BITS

QUANT_METHOD = "codequant"
FORMAT = 1
ACTIVATION_BITS = (4, 8, 16)


@dataclass(frozen=True)
class Scheme:
    """How one matrix and its input are quantized."""

    bits: int = 4
    group_size: int = -1
    activation_bits: int = 8
    activation_clip: float = 1.0
    hadamard: bool = False  # multiply the input by the online Hadamard matrix of its width first

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits: {self.bits}, expected one of {BITS}")
        if self.group_size != -1 and self.group_size <= 0:
            raise InputError(f"group_size: {self.group_size}, expected -1 (whole rows) or a positive number")
        if self.activation_bits not in ACTIVATION_BITS:
            raise InputError(f"activation_bits: {self.activation_bits}, expected one of {ACTIVATION_BITS}")
        if not 0 < self.activation_clip <= 1:
            raise InputError(f"activation_clip: {self.activation_clip}, expected a number in (0, 1]")


@dataclass(frozen=True)
class QuantizationConfig:
    default: Scheme = Scheme()
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a module by its checkpoint name, or None where it stays in the source's precision."""
        if any(fnmatchcase(module, pattern) for pattern in self.ignore):
            return None
        exact, patterns = self._places
        places = [place for pattern, place in patterns.items() if fnmatchcase(module, pattern)]
        places += [exact[module]] if module in exact else []
        scheme = self.default
        for place in sorted(places):
            scheme = replace(scheme, **self._changes[place])
        return scheme

    @cached_property
    def _changes(self) -> list[dict[str, Any]]:
        return list(self.overrides.values())

    @cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        """Where each override stands: of whole names, of which there may be one for each of thousands of experts, and
        of patterns."""
        found: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for place, pattern in enumerate(self.overrides):
            found[any(character in pattern for character in "*?[")][pattern] = place
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            **asdict(self.default),
            "ignore": list(self.ignore),
            "overrides": [
                {"modules": patterns if len(patterns) > 1 else patterns[0], **self.overrides[patterns[0]]}
                for _, run in groupby(self.overrides, key=self.overrides.__getitem__)
                for patterns in [list(run)]
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationConfig":
        """Parse config.json's entry. Raises InputError naming the field, its value and what was expected."""
        values = dict(values)
        if (method := values.pop("quant_method", None)) != QUANT_METHOD:
            raise InputError(f"quant_method: {method!r}, expected {QUANT_METHOD!r}")
        if (version := values.pop("format", None)) != FORMAT:
            raise InputError(f"format: {version!r}, expected {FORMAT}; this codequant reads no other version")
        known = {f.name for f in fields(Scheme)}
        ignore = tuple(values.pop("ignore", ()))
        overrides: dict[str, dict[str, Any]] = {}
        for i, entry in enumerate(values.pop("overrides", ())):
            if not isinstance(entry, dict) or "modules" not in entry:
                raise InputError(f"overrides[{i}]: {entry!r}, expected an object with a pattern 'modules'")
            modules = entry["modules"] if isinstance(entry["modules"], list) else [entry["modules"]]
            if not all(isinstance(pattern, str) for pattern in modules):
                raise InputError(f"overrides[{i}].modules: {entry['modules']!r}, expected a pattern or a list of them")
            overrides |= {pattern: {k: v for k, v in entry.items() if k != "modules"} for pattern in modules}
        for where, keys in [("quantization_config", values), *((f"overrides[{p!r}]", c) for p, c in overrides.items())]:
            for key in keys:
                if key not in known:
                    raise InputError(f"{where}: unknown key {key!r}, expected some of {sorted(known)}")
        config = cls(Scheme(**values), ignore, overrides)
        for pattern in overrides:
            replace(config.default, **overrides[pattern])  # validates the values
        return config
