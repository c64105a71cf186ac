"""Find out how a decoder layer is wired by pushing probes through it, instead of listing it per model family.

A layer is run on two tokens with its matrices replaced by probes: every linear map returns a chosen constant, every
norm a marker value of its own, attention hands its values straight through, and experts return a constant. No weight
is needed (the matrices stay on the meta device), so the structure is known from the config alone. Then

- a linear map that is handed the marker of a norm *reads* that norm;
- a linear map whose output, set to one, shows up in the layer's output *writes* the residual stream;
- row numbers, pushed through one binary digit at a time, tell which row of a producer a consumer's column reads:
  an elementwise nonlinearity between them keeps digits apart, whatever it is.

The alternative, a table of module names per model type (the published code has one branch per model), breaks with
every new family and every rename; a wrong answer here is caught by the invariance proof of `folding.py`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from codequant.errors import InputError
from codequant.structure import ChannelPair, ExpertsStructure, LayerStructure, Norm, Site

TOKENS = 2
ATTENTION = "codequant_probe"
MARKER = 1000.0  # norm k answers MARKER + k: exact in float32 and far from every probe value


def _hand_values_through(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as the identity: value [B, kv heads, T, d] repeated to the query heads -> [B, T, heads, d]."""
    head_dims: set[int] = module.config._codequant_head_dims
    head_dims.add(value.shape[-1])
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return value.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _hand_values_through)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a fused experts block of transformers (`@use_experts_implementation`)."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and (weight is None or weight.ndim == 1)


def describe_norm(path: str, module: nn.Module) -> Norm:
    """Classify a norm by what it computes: shift invariance means LayerNorm, a live zero gain means 1 + weight."""
    width = module.weight.numel()
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    nn.init.ones_(probe.weight)
    if (bias := getattr(probe, "bias", None)) is not None:
        nn.init.zeros_(bias)
    x = torch.linspace(-1.0, 2.0, width).reshape(1, 1, width)
    with torch.no_grad():
        centered = torch.allclose(probe(x), probe(x + 3.0), atol=1e-3)
        nn.init.zeros_(probe.weight)
        unit_offset = bool(probe(x).abs().max() > 0)
    return Norm(path, centered, unit_offset, bias is not None)


class _Linears(TorchFunctionMode):
    """Answers every `F.linear` on a tracked (meta) matrix with that matrix's probe and records what it was handed."""

    def __init__(self, matrices: dict[int, str], outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = dict(matrices)  # id(tensor) -> module path
        self.outputs = outputs  # module path -> the vector it returns for every token
        self.keep: list[Tensor] = []  # keeps aliases alive, so that an id is never reused
        self.inputs: dict[str, Tensor] = {}  # module path -> input, in execution order

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if func is F.linear and id(weight) in self.names:
            name = self.names[id(weight)]
            x = args[0] if args else kwargs["input"]
            self.inputs[name] = x.detach().clone()
            return self.outputs[name].to(x.dtype).expand(*x.shape[:-1], -1).clone()
        result = func(*args, **kwargs)
        if args and id(args[0]) in self.names and isinstance(result, Tensor) and result.is_meta:
            self.names[id(result)] = self.names[id(args[0])]  # a cast of the matrix is still that matrix
            self.keep.append(result)
        return result


class _Probe:
    """A decoder layer prepared for probing; `run` executes it once."""

    def __init__(self, layer: nn.Module, arguments: dict[str, Any], hidden_size: int) -> None:
        self.layer = layer = copy.deepcopy(layer)
        self.hidden_size = hidden_size
        self.arguments = arguments
        self.experts = {path: m for path, m in layer.named_modules() if is_experts(m)}
        inside_experts = tuple(f"{path}." for path in self.experts)
        modules = {p: m for p, m in layer.named_modules() if p not in self.experts and not p.startswith(inside_experts)}
        self.norms = {p: m for p, m in modules.items() if is_norm(m)}
        self.linears = {p: m for p, m in modules.items() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}
        self.matrices = {id(m.weight): p for p, m in self.linears.items()}
        self.configs = list({id(m.config): m.config for m in modules.values() if hasattr(m, "config")}.values())
        self.norm_inputs: dict[str, Tensor] = {}
        self.experts_input: Tensor | None = None
        self.experts_output = 0.0
        for module in modules.values():  # biases, sinks and correction vectors become zeros; norms never use theirs
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_meta and tensor.ndim < 2:
                    value = torch.zeros_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        setattr(module, name, nn.Parameter(value, requires_grad=False))
                    else:
                        setattr(module, name, value)
        self.markers = {path: MARKER + k for k, path in enumerate(self.norms)}
        for path, norm in self.norms.items():
            norm.forward = self._norm_forward(path)
        for module in self.experts.values():
            module.forward = self._experts_forward

    def _norm_forward(self, path: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.norm_inputs[path] = x.detach().clone()
            return torch.full_like(x, self.markers[path])

        return forward

    def _experts_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.experts_input = hidden_states.detach().clone()
        return torch.full_like(hidden_states, self.experts_output)

    def run(
        self,
        outputs: dict[str, Tensor] | None = None,
        default: float = 0.0,
        experts: float = 0.0,
        residual: float = 0.0,
    ) -> "_Linears":
        """One pass; linear maps return `outputs[path]`, or `default` everywhere. The result is in `.result`."""
        self.norm_inputs, self.experts_output = {}, experts
        vectors = {p: torch.full((m.weight.shape[0],), default) for p, m in self.linears.items()} | (outputs or {})
        mode = _Linears(self.matrices, vectors)
        x = torch.full((1, TOKENS, self.hidden_size), residual)
        with torch.no_grad(), mode, _probe_attention(self.configs) as head_dims:
            result = self.layer(x, **self.arguments)
        self.head_dims = head_dims
        self.result = result[0] if isinstance(result, tuple) else result
        return mode

    def marker_of(self, x: Tensor) -> str | None:
        """The norm whose marker fills x."""
        return next((path for path, marker in self.markers.items() if bool((x == marker).all())), None)

    def reaches_output(self, path: str) -> bool:
        """Whether this norm's output is added to the residual stream (a post-norm)."""
        saved, self.markers = self.markers, {other: float(other == path) for other in self.markers}
        self.run()
        self.markers = saved
        return bool((self.result != 0).any())


@contextmanager
def _probe_attention(configs: list[Any]) -> Iterator[set[int]]:
    saved = [config._attn_implementation for config in configs]
    head_dims: set[int] = set()
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
            config._codequant_head_dims = head_dims
        yield head_dims
    finally:
        for config, implementation in zip(configs, saved):
            config._attn_implementation = implementation
            del config._codequant_head_dims


def discover(layer: nn.Module, arguments: dict[str, Any], hidden_size: int, name: str) -> LayerStructure:
    """The structure of one decoder layer (parameters on the meta device, left untouched).

    arguments: what the model passes to the layer besides the hidden states, for 1 sequence of `TOKENS` tokens.
    name: how errors call the layer. Raises InputError where the layer cannot be probed at all.
    """
    probe = _Probe(layer, arguments, hidden_size)
    try:
        mode = probe.run()
    except Exception as error:
        raise InputError(
            f"{name}: {type(layer).__name__} cannot be traced ({type(error).__name__}: {error}), "
            "expected a decoder layer of norms, linear maps, attention and experts"
        ) from error

    probe.run(residual=1.0)
    norms = {  # the residual stream reaches a norm directly only where every linear map in between answers zero
        path: describe_norm(path, layer.get_submodule(path))
        for path, x in probe.norm_inputs.items()
        if x.shape[-1] == hidden_size and bool((x != 0).all())
    }
    probe.run()
    obstacles = []
    if bool((probe.result != 0).any()):
        markers = [path for path in probe.norms if probe.reaches_output(path)]
        obstacles.append(f"the output of {', '.join(markers) or 'a nonlinear map'} is added to the residual stream")

    sites: list[Site] = []
    for path, x in mode.inputs.items():
        norm = norms.get(probe.marker_of(x) or "")
        if norm is not None and sites and (site := next((s for s in sites if s.norm == norm), None)):
            sites[sites.index(site)] = Site((*site.readers, path), norm)
        else:
            sites.append(Site((path,), norm))

    writers, writes_from_experts = [], False
    for path in mode.inputs:
        probe.run({path: torch.ones(probe.linears[path].weight.shape[0])})
        if probe.result.shape[-1] == hidden_size and bool((probe.result != 0).all()) and not obstacles:
            writers.append(path)
    experts = experts_norm = None
    if probe.experts:
        if len(probe.experts) > 1:
            raise InputError(f"{name}: {len(probe.experts)} experts modules, expected at most one")
        path, module = next(iter(probe.experts.items()))
        mode = probe.run(experts=1.0)
        writes_from_experts = bool((probe.result != 0).all())
        if probe.experts_input is not None:
            experts_norm = norms.get(probe.marker_of(probe.experts_input) or "")
        if not obstacles and not (writes_from_experts and experts_norm):
            obstacles.append(f"{path} does not map a normed residual to the residual stream")
        experts = describe_experts(path, module, _router(probe))

    for path in norms:
        read = any(site.norm == norms[path] for site in sites) or experts_norm == norms[path]
        if not read and not obstacles:
            obstacles.append(f"no linear map reads {path}")
    used = tuple(n for n in norms.values() if any(s.norm == n for s in sites) or experts_norm == n)
    routers = tuple(p for p in mode.inputs if experts and p == experts.router)
    pairs = tuple(_pairs(probe, sites))
    return LayerStructure(tuple(sites), used, routers, tuple(writers), pairs, experts, experts_norm, tuple(obstacles))


def describe_experts(path: str, module: nn.Module, router: str | None = None) -> ExpertsStructure:
    """Read the flags that `@use_experts_implementation` put on an experts module."""
    if getattr(module, "has_post_expert_norm", False):
        raise InputError(f"{path}: experts with a norm after each expert are not supported")
    down = module.down_proj
    intermediate = down.shape[1] if module.is_transposed else down.shape[2]
    return ExpertsStructure(
        path,
        router,
        down.shape[0],
        intermediate,
        module.is_concatenated,
        module.is_transposed,
        module.has_gate,
        module.has_bias,
    )


def _router(probe: _Probe) -> str | None:
    """The linear map with one output per expert beside the experts module."""
    path, module = next(iter(probe.experts.items()))
    parent = path.rpartition(".")[0]
    num_experts = module.down_proj.shape[0]
    found = [
        p
        for p, m in probe.linears.items()
        if p.startswith(f"{parent}." if parent else "") and m.weight.shape == (num_experts, probe.hidden_size)
    ]
    return found[0] if len(found) == 1 else None


def _pairs(probe: _Probe, sites: list[Site]) -> Iterator[ChannelPair]:
    """Producers and consumer of every inner tensor, found by numbering the producers' rows in binary."""
    baseline = probe.run(default=1.0).inputs
    doubled: dict[str, dict[str, Tensor]] = {}
    for path in baseline:
        rows = probe.linears[path].weight.shape[0]
        doubled[path] = probe.run({path: torch.full((rows,), 2.0)}, default=1.0).inputs
    for site in sites:
        if site.norm is not None:
            continue
        consumer = site.readers[0]
        x = baseline[consumer]
        producers: dict[str, Tensor] = {}
        linear = True
        for path in baseline:
            if path == consumer or not bool((doubled[path][consumer] != x).all()):
                continue
            rows = probe.linears[path].weight.shape[0]
            number = torch.arange(rows)
            row_of_column = torch.zeros(x.shape[-1], dtype=torch.int64)
            for digit in range(max(1, (rows - 1).bit_length())):
                seen = probe.run({path: 1.0 + ((number >> digit) & 1)}, default=1.0).inputs[consumer]
                row_of_column |= (seen != x).flatten(0, -2)[0].long() << digit
            producers[path] = row_of_column
            linear &= bool(torch.allclose(doubled[path][consumer], 2 * x))
        maps = list(producers.values())
        if (
            not maps
            or any(not torch.equal(m, maps[0]) for m in maps)
            or int(maps[0].max()) >= min(probe.linears[p].weight.shape[0] for p in producers)
        ):
            continue
        through_attention = len(maps) == 1 and linear
        block = next(iter(probe.head_dims)) if through_attention and len(probe.head_dims) == 1 else x.shape[-1]
        yield ChannelPair(tuple(producers), consumer, maps[0], block, through_attention)
