"""The units of work of a run, in the order of the recipe. Each is a pure function of the results that it names.

    embed(w)          token windows -> hidden states of the source model (the teacher)
    teacher(l, w)     one layer of the teacher, and samples of its normed residual
    rotation          R from the samples
    ends              embedding, final norm and head in the new basis
    enter(w)          token windows -> hidden states of the quantized model (the student)
    dense(l)          quantize a layer's attention, shared experts and dense matrices
    route(l, w)       what the layer's experts are handed, in both models
    experts(l, s)     quantize a shard of the layer's experts
    layer(l)          the layer's final tensors: one shard of the output
    student(l, w)     one layer of the student

w counts shards of calibration windows and s shards of experts; both are fixed by the recipe and the model, never by
the machine, so results do not depend on how many workers there are.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codequant import rotation as rotations
from codequant.checkpoint_names import Source as TensorSource
from codequant.discovery import describe_norm
from codequant.error_feedback import damped
from codequant.errors import InvarianceError
from codequant.executor import Unit, measure
from codequant.folding import (
    fold_experts,
    fold_layer,
    fold_norm,
    fold_reader,
    gain_of,
    head_blocks,
    mix_pair,
    rotate_rows,
)
from codequant.kernels.reference import fake_quantize
from codequant.packing import SUFFIXES, PackedWeight, pack, unpack
from codequant.quantization_config import QuantizationConfig, Scheme
from codequant.recipe import Recipe
from codequant.runtime.hadamard import hadamard_matrix, hadamard_transform
from codequant.schemes import quantization_config
from codequant.source import SourceModel
from codequant.store import Record, Store
from codequant.weight_quantization import QuantizedWeight, WeightOptions, quantize_weight, target_weight
from codequant.working_layer import Experts, WorkingLayer

Result = tuple[dict[str, Tensor], dict[str, Any]]
WINDOWS = "calibration"  # key of the token windows, int32 [N, T]
SHARD_BYTES = 384 << 20  # second moments and weights of one shard of experts
MIN_SHARDS = 4  # per layer, so that small layers too keep several workers busy
PROOF_TOKENS = 4
PROOF_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Moments:
    """Second moments of a matrix's input over the calibration tokens, per token."""

    hessian: Tensor  # E[a_q a_q^T], [I, I]: the quantized prefix's inputs
    cross: Tensor  # E[a a_q^T]: the source model's inputs against them


class Context:
    """What every unit may use: the source model, the recipe and the results of other units."""

    def __init__(self, source: SourceModel, recipe: Recipe, store: Store, device: str = "cpu") -> None:
        self.source, self.recipe, self.store, self.device = source, recipe, store, torch.device(device)

    @cached_property
    def config(self) -> QuantizationConfig:
        return quantization_config(self.source, self.recipe)

    @cached_property
    def arguments(self) -> list[dict[str, Any]]:
        """Each layer's keyword arguments for one calibration window, on the device."""
        return [to_device(a, self.device) for a in self.source.layer_arguments(self.recipe.calibration.length)]

    @cached_property
    def rotates(self) -> bool:
        return self.recipe.rotation.method != "none"

    @cached_property
    def rotation(self) -> Tensor | None:
        if not self.rotates:
            return None
        return self.store.read_one("rotation", "rotation").to(self.device)

    @property
    def window_shards(self) -> int:
        c = self.recipe.calibration
        return -(-c.windows // c.windows_per_unit)

    def windows(self, shard: int) -> Tensor:
        n = self.recipe.calibration.windows_per_unit
        return self.store.read_one(WINDOWS, "windows")[shard * n : (shard + 1) * n].long()

    def hidden(self, stream: str, layer: int, shard: int) -> Tensor:
        """The input [n, T, H] of a layer in the teacher's or the student's residual stream."""
        return self.store.read_one(hidden_key(stream, layer, shard), "hidden").to(self.device)

    def expert_shards(self, layer: int) -> list[slice]:
        """Runs of experts whose second moments and weights fit in SHARD_BYTES."""
        experts = self.source.structures[layer].experts
        if experts is None:
            return []
        H, M = self.source.hidden_size, experts.intermediate
        bytes_per_expert = 4 * (4 * H * H + 4 * M * M + 6 * 3 * H * M)
        size = max(1, min(-(-experts.num_experts // MIN_SHARDS), SHARD_BYTES // bytes_per_expert))
        return [slice(i, min(i + size, experts.num_experts)) for i in range(0, experts.num_experts, size)]

    def module_name(self, layer: int, reader: str) -> str:
        (entry,) = self.source.sources[f"{self.source.layer_names[layer]}.{reader}.weight"]
        return entry.module

    def scheme(self, layer: int, reader: str) -> Scheme | None:
        return self.config.scheme(self.module_name(layer, reader))

    def folded_tensors(self, layer: int, rotation: Tensor | None) -> dict[str, Tensor]:
        """A layer's non-expert tensors with gains folded, value heads mixed and the residual rotated."""
        tensors = {k: v.to(self.device) for k, v in self.source.layer_tensors(layer).items()}
        structure = self.source.structures[layer]
        tensors = fold_layer(tensors, structure, rotation)
        if self.rotates and self.recipe.rotation.heads:
            for pair in structure.pairs:
                if pair.linear and self.scheme(layer, pair.consumer) is not None:
                    mix = hadamard_matrix(pair.block)
                    mix_pair(tensors, pair, [mix] * len(head_blocks(pair)))
        return tensors

    def working_layer(self, layer: int, tensors: dict[str, Tensor]) -> WorkingLayer:
        source = self.source
        return WorkingLayer(source.layers[layer], source.structures[layer], self.arguments[layer], tensors)

    def experts_gain(self, layer: int) -> Tensor | None:
        norm = self.source.structures[layer].experts_norm
        if norm is None:
            return None
        name = f"{self.source.layer_names[layer]}.{norm.path}"
        tensors = {f"{norm.path}.weight": self.source.read(f"{name}.weight", torch.float32)}
        if norm.has_bias:
            tensors[f"{norm.path}.bias"] = self.source.read(f"{name}.bias", torch.float32)
        return gain_of(norm, tensors).to(self.device)

    def apply_gate(self, layer: int) -> Callable[[Tensor], Tensor]:
        """[N, 2M] gate and up -> [N, M], by the experts module's own rule (activation, clamps)."""
        structure = self.source.structures[layer].experts
        assert structure is not None
        module = self.source.layers[layer].get_submodule(structure.path)
        if not structure.has_gate:
            return module.act_fn

        def apply(x: Tensor) -> Tensor:
            if not structure.is_concatenated:  # the module's rule expects its own interleaved order
                x = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
            return module._apply_gate(x)

        return apply


def hidden_key(stream: str, layer: int, shard: int) -> str:
    """Key of the unit that makes the input of `layer`."""
    if layer == 0:
        return f"{'embed' if stream == 'teacher' else 'enter'}.w{shard:03d}"
    return f"{stream}.l{layer - 1:03d}.w{shard:03d}"


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


# --- the source model ------------------------------------------------------------------------------------------------


def embed(context: Context, shard: int) -> Result:
    source, ids = context.source, context.windows(shard)
    (entry,) = source.sources[f"{source.embedding_name}.weight"]
    embedded = F.embedding(ids, source.read(entry.parameter).float())
    return {"hidden": source.first_hidden_states(embedded)}, {}


def teacher(context: Context, layer: int, shard: int) -> Result:
    """One layer of the source model on one shard of windows, and samples of the normed residual for the rotation."""
    structure = context.source.structures[layer]
    working = context.working_layer(layer, context.folded_tensors(layer, None))
    x = context.hidden("teacher", layer, shard)
    with working.observing([norm.path for norm in structure.norms]) as normed:
        hidden = working.run(x, source_experts(context, layer, None))
    tensors = {"hidden": hidden.cpu()}
    sites = sum(len(s.norms) for s in context.source.structures)
    count = max(1, context.recipe.rotation.samples // (sites * context.window_shards)) if context.rotates else 0
    seed = context.recipe.rotation.seed + layer * context.window_shards + shard
    for k, norm in enumerate(structure.norms if count else ()):
        rows = normed[norm.path].flatten(0, -2)
        picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        tensors[f"samples.{k}"] = rows[picked.to(rows.device)].half().cpu()
    return tensors, {}


def source_experts(context: Context, layer: int, rotation: Tensor | None) -> Experts | None:
    """The source's experts in the given basis, one at a time: read, fold, multiply, forget."""
    if context.source.structures[layer].experts is None:
        return None
    gain = context.experts_gain(layer)
    return experts_of(context, layer, lambda e: read_experts(context, layer, slice(e, e + 1), gain, rotation))


def experts_of(context: Context, layer: int, read: Callable[[int], dict[str, Tensor]], inner: Scheme | None = None) -> Experts:
    """Experts whose weights come from `read(expert)`, a stack of one; inner: how down reads the intermediate."""
    apply_gate = context.apply_gate(layer)

    def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in torch.unique(top_k_index).tolist():
            t = read(expert)
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            hidden = apply_gate(F.linear(x[token], t["gate_up"][0], only(t.get("gate_up_bias"))))
            out = F.linear(as_read(hidden, inner), t["down"][0], only(t.get("down_bias")))
            y.index_add_(0, token, out * top_k_weights[token, slot, None].to(out.dtype))
        return y

    return run


def only(stack: Tensor | None) -> Tensor | None:
    return None if stack is None else stack[0]


def read_experts(
    context: Context, layer: int, experts: slice, gain: Tensor | None, rotation: Tensor | None
) -> dict[str, Tensor]:
    """A run of experts in canonical layout and float32, folded."""
    t = {k: v.to(context.device) for k, v in context.source.expert_tensors(layer, experts).items()}
    t["gate_up"], t["down"], bias = fold_experts(t["gate_up"], t["down"], t.get("down_bias"), gain, rotation)
    if bias is not None:
        t["down_bias"] = bias
    return t


# --- the rotation ----------------------------------------------------------------------------------------------------


def learn_rotation(context: Context) -> Result:
    """R from the cached activations of all layers; centered norms confine it to rotations that keep the ones vector."""
    recipe, source = context.recipe.rotation, context.source
    pooled = [
        context.store.read_one(hidden_key("teacher", layer + 1, shard), f"samples.{k}")
        for layer, structure in enumerate(source.structures)
        for k in range(len(structure.norms))
        for shard in range(context.window_shards)
    ]
    samples = torch.cat(pooled).to(context.device)
    del pooled
    keep_ones = any(norm.centered for structure in source.structures for norm in structure.norms)
    direction = torch.ones(source.hidden_size) if keep_ones else rotations.strongest_direction(samples)
    start = rotations.hadamard_start(hadamard_matrix(source.hidden_size), direction, recipe.seed)
    fit = rotations.learn(
        samples, start, recipe.steps, recipe.learning_rate, recipe.batch, recipe.seed, keep_ones=keep_ones
    )
    identity = torch.eye(source.hidden_size, dtype=torch.float64)
    info = {
        "range_loss_unrotated": float(rotations.range_loss(samples[::8].float())),
        "range_loss_start": fit.loss_before,
        "range_loss": fit.loss_after,
        "orthogonality_error": float((fit.rotation @ fit.rotation.T - identity).abs().max()),
    }
    return {"rotation": fit.rotation.float()}, info


# --- the ends of the model -------------------------------------------------------------------------------------------


def ends(context: Context) -> Result:
    """Embedding, final norm and output head in the new basis, by checkpoint name. A tied head is written out."""
    source, rotation = context.source, context.rotation
    norm = describe_norm(source.norm_name, source.model.get_submodule(source.norm_name))
    prefix = f"{source.norm_name}."
    tensors = {n: source.read(n, torch.float32) for n in source.sources if n.startswith(prefix)}
    gain = gain_of(norm, tensors)
    embedding = source.read(f"{source.embedding_name}.weight", torch.float32)
    head = embedding if source.is_tied else source.read(f"{source.head_name}.weight", torch.float32)
    cpu_rotation = None if rotation is None else rotation.cpu()
    tensors[f"{source.head_name}.weight"] = fold_reader(head, gain, cpu_rotation)
    tensors[f"{source.embedding_name}.weight"] = rotate_rows(embedding, cpu_rotation)
    fold_norm(norm, tensors, cpu_rotation)
    if f"{source.head_name}.bias" in source.sources:
        tensors[f"{source.head_name}.bias"] = source.read(f"{source.head_name}.bias")
    named = {(source.sources[n][0].name if n in source.sources else n): t for n, t in tensors.items()}
    return {name: tensor.to(source.dtype) for name, tensor in named.items()}, {}


def enter(context: Context, shard: int) -> Result:
    """The student's first hidden states, from the embedding as it is stored."""
    source = context.source
    name = source.sources[f"{source.embedding_name}.weight"][0].name
    embedded = F.embedding(context.windows(shard), context.store.read_one("ends", name).float())
    return {"hidden": source.first_hidden_states(embedded)}, {}


# --- a layer of the quantized model ----------------------------------------------------------------------------------


def dense(context: Context, layer: int) -> Result:
    """Quantize everything of a layer but its experts, site by site in execution order, each on the inputs that the
    sites before it, already quantized, hand on. Also the all-token moments of the experts' input."""
    structure = context.source.structures[layer]
    tensors = context.folded_tensors(layer, context.rotation)
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    student_layer = context.working_layer(layer, tensors)
    info: dict[str, Any] = {"proof": prove(context, layer, teacher_layer, student_layer), "errors": {}}
    result = plain_tensors(context, layer, tensors)
    student_layer = context.working_layer(layer, tensors | local_tensors(context, layer, result))
    for site in structure.sites:
        readers = [r for r in site.readers if context.scheme(layer, r) is not None]
        if not readers:
            continue
        scheme = context.scheme(layer, readers[0])
        assert scheme is not None
        basis = context.rotation if site.norm is not None else None

        def inputs(shard: int, reader: str = readers[0], basis: Tensor | None = basis) -> tuple[Tensor, Tensor]:
            student = student_layer.input_of(reader, context.hidden("student", layer, shard))
            source = teacher_layer.input_of(reader, context.hidden("teacher", layer, shard))
            return student, rotate_rows(source, basis)

        moments = accumulate((inputs(shard) for shard in range(context.window_shards)), scheme)
        weight = torch.cat([student_layer.weight(r) for r in readers])
        rows = [student_layer.weight(r).shape[0] for r in readers]
        quantized = quantize(context, scheme, weight[None], moments)
        for reader, part in zip(readers, split_rows(quantized, rows)):
            part = pick(part, 0)
            result |= packed_tensors(context.module_name(layer, reader), part)
            student_layer.replace(reader, unpack(part).to(context.device), lambda x, s=scheme: as_read(x, s))
            info["errors"][context.module_name(layer, reader)] = float(quantized.error[0])
    if structure.experts is not None:
        scheme = experts_scheme(context, layer, inner=False)

        def handed(shard: int) -> tuple[Tensor, Tensor]:
            student = student_layer.routed(context.hidden("student", layer, shard)).x
            source = teacher_layer.routed(context.hidden("teacher", layer, shard)).x
            return student, rotate_rows(source, basis_of_experts(context, layer))

        moments = accumulate((handed(shard) for shard in range(context.window_shards)), scheme)
        result |= {"moments.hessian": moments.hessian.cpu(), "moments.cross": moments.cross.cpu()}
    return result, info


def plain_tensors(context: Context, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The folded tensors that are not quantized, by checkpoint name, as the output stores them."""
    return {
        name: stored(context, name, tensors[path]) for path, name in plain_names(context, layer, tensors).items()
    }


def local_tensors(context: Context, layer: int, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """`plain_tensors` under their paths in the layer, ready to compute with."""
    prefix = f"{context.source.layer_names[layer]}."
    paths = {e.name: p.removeprefix(prefix) for p, (e, *_) in context.source.sources.items() if p.startswith(prefix)}
    return {paths[name]: t.to(context.device, torch.float32) for name, t in plain.items()}


def plain_names(context: Context, layer: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Path in the layer -> checkpoint name, of the tensors that are not quantized."""
    quantized = {
        f"{reader}.weight"
        for site in context.source.structures[layer].sites
        for reader in site.readers
        if context.scheme(layer, reader) is not None
    }
    prefix = context.source.layer_names[layer]
    return {path: context.source.sources[f"{prefix}.{path}"][0].name for path in tensors if path not in quantized}


def stored(context: Context, name: str, tensor: Tensor) -> Tensor:
    """An unquantized tensor as the output stores it: in the source's own precision."""
    kept = {"F32": torch.float32, "F16": torch.float16}
    dtype = kept.get(context.source.checkpoint.entry(name).dtype, torch.bfloat16)
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).cpu()


def basis_of_experts(context: Context, layer: int) -> Tensor | None:
    return context.rotation if context.source.structures[layer].experts_norm is not None else None


def as_read(x: Tensor, scheme: Scheme | None) -> Tensor:
    """What a quantized matrix makes of its input [..., I]: the Hadamard transform, then the rounding to integers."""
    if scheme is None:
        return x
    if scheme.hadamard:
        x = hadamard_transform(x)
    return fake_quantize(x, scheme.activation_bits, scheme.activation_clip)


def accumulate(inputs: Iterable[tuple[Tensor, Tensor]], scheme: Scheme | None) -> Moments:
    """Moments over batches of (student's inputs [N, I], source's inputs [N, I])."""
    hessian = cross = None
    count = 0
    for student, source in inputs:
        a_q = as_read(student, scheme)
        a = hadamard_transform(source) if scheme is not None and scheme.hadamard else source
        h, c = (a_q.T @ a_q).double(), (a.T @ a_q).double()
        hessian, cross = (h, c) if hessian is None else (hessian.add_(h), cross.add_(c))
        count += len(a_q)
    assert hessian is not None and cross is not None
    return Moments((hessian / count).float(), (cross / count).float())


def quantize(context: Context, scheme: Scheme, weight: Tensor, moments: Moments) -> QuantizedWeight:
    """Quantize a stack of folded matrices [B, O, I] on the moments of their inputs ([I, I] or [B, I, I])."""
    w = context.recipe.weights
    if scheme.hadamard:
        weight = hadamard_transform(weight)
    hessian = damped(moments.hessian, w.damping)
    target = None
    if w.correction and w.method == "hessian":
        # the cross moment gets the same ridge, so that equal inputs leave the target where it is
        ridge = hessian - moments.hessian
        target = target_weight(weight, hessian, moments.cross + ridge, w.correction)
    options = WeightOptions(
        bits=scheme.bits, group_size=scheme.group_size, method=w.method, rounds=w.rounds, sweeps=w.sweeps
    )
    return quantize_weight(weight, hessian, target, options)


def split_rows(quantized: QuantizedWeight, rows: list[int]) -> list[PackedWeight]:
    """Packed matrices [B, rows, ...] of runs of rows."""
    parts = zip(*(t.split(rows, dim=1) for t in (quantized.indices, quantized.codebook, quantized.step)))
    return [pack(*part) for part in parts]


def packed_tensors(module: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors of one matrix under the names of the format."""
    return {f"{module}.weight_{suffix}": getattr(weight, suffix).cpu() for suffix in SUFFIXES}


def pick(weight: PackedWeight, index: int) -> PackedWeight:
    """One matrix of a stack."""
    return PackedWeight(weight.packed[index], weight.codebook[index], weight.step[index], weight.in_features)


def prove(context: Context, layer: int, teacher_layer: WorkingLayer, student_layer: WorkingLayer) -> float:
    """Relative difference between the layer in the new basis and the source's, in float32 on real tokens.

    Both layers are unquantized here. All tokens of one window go through attention; the experts, which are costly to
    rotate, are compared on its last tokens. Raises InvarianceError if the paths part.
    """
    x, rotation = context.hidden("teacher", layer, 0)[:1], context.rotation

    def on_last_tokens(basis: Tensor | None) -> Experts | None:
        if (run := source_experts(context, layer, basis)) is None:
            return None

        def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[-PROOF_TOKENS:] = run(*(t[-PROOF_TOKENS:] for t in (x, top_k_index, top_k_weights)))
            return y

        return experts

    expected = rotate_rows(teacher_layer.run(x, on_last_tokens(None)), rotation)[:, -PROOF_TOKENS:]
    got = student_layer.run(rotate_rows(x, rotation), on_last_tokens(rotation))[:, -PROOF_TOKENS:]
    error = float((got - expected).norm() / expected.norm())
    if not error <= PROOF_TOLERANCE:
        raise InvarianceError(
            f"{context.source.layer_names[layer]}: the rotated layer differs from the source by {error:.2e}, expected at "
            f"most {PROOF_TOLERANCE:g}; --set rotation.method=none quantizes without a rotation"
        )
    return error


# --- experts ---------------------------------------------------------------------------------------------------------


def experts_scheme(context: Context, layer: int, inner: bool) -> Scheme | None:
    """How a layer's experts read their input (inner: their intermediate); the same for all experts of a layer."""
    name, _ = context.source.expert_matrices(layer)[int(inner)]
    return context.config.scheme(context.source.sources[name][0].module)


def route(context: Context, layer: int, shard: int) -> Result:
    """What the experts are handed on one shard of windows, by the student's own routing, and by the teacher's input."""
    student_layer = finished_dense(context, layer, dense_key(layer))
    routed = student_layer.routed(context.hidden("student", layer, shard))
    teacher_layer = context.working_layer(layer, context.folded_tensors(layer, None))
    source = teacher_layer.routed(context.hidden("teacher", layer, shard)).x
    return {
        "x": routed.x.cpu(),
        "source_x": source.cpu(),
        "top_k_index": routed.top_k_index.to(torch.int32).cpu(),
        "top_k_weights": routed.top_k_weights.float().cpu(),
    }, {}


def finished_dense(context: Context, layer: int, key: str) -> WorkingLayer:
    """The student's layer, its experts apart, with every tensor as `key` stores it."""
    source, structure = context.source, context.source.structures[layer]
    shapes = {path: tensor for path, tensor in source.layers[layer].state_dict().items()}
    own = [p for p in shapes if structure.experts is None or not p.startswith(f"{structure.experts.path}.")]
    plain = context.store.read(key, *plain_names(context, layer, {p: shapes[p] for p in own}).values())
    working = context.working_layer(layer, local_tensors(context, layer, plain))
    for site in structure.sites:
        for reader in site.readers:
            if (scheme := context.scheme(layer, reader)) is not None:
                in_features = shapes[f"{reader}.weight"].shape[1]
                packed = read_packed(context, key, context.module_name(layer, reader), in_features)
                working.replace(reader, unpack(packed).to(context.device), lambda x, s=scheme: as_read(x, s))
    return working


def read_packed(context: Context, key: str, module: str, in_features: int) -> PackedWeight:
    names = [f"{module}.weight_{suffix}" for suffix in SUFFIXES]
    saved = context.store.read(key, *names)
    return PackedWeight(*(saved[name] for name in names), in_features=in_features)


@dataclass
class Sums:
    """Running second moments of one expert's input, weighted per token."""

    hessian: Tensor
    cross: Tensor
    tokens: int = 0
    weight: float = 0.0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> "Sums":
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, student: Tensor, source: Tensor, share: Tensor | None = None) -> None:
        """student [N, I] as the matrix reads it, source [N, I]; share [N, 1] the routing weight of each token."""
        weighted = student if share is None else student * share.square()
        self.hessian += student.T @ weighted
        self.cross += source.T @ weighted
        self.tokens += len(student)
        self.weight += float(len(student) if share is None else share.square().sum())

    def mean(self) -> Moments:
        scale = 1 / max(self.weight, 1e-30)
        return Moments(self.hessian * scale, self.cross * scale)


def mixed(own: Moments, everything: Moments, share: float) -> Moments:
    return Moments(
        torch.lerp(own.hessian, everything.hessian, share), torch.lerp(own.cross, everything.cross, share)
    )


def stack(moments: list[Moments]) -> Moments:
    return Moments(torch.stack([m.hessian for m in moments]), torch.stack([m.cross for m in moments]))


def routed_batches(context: Context, layer: int) -> Iterator[dict[str, Tensor]]:
    """The results of `route`, one shard of windows at a time."""
    for shard in range(context.window_shards):
        batch = context.store.read(route_key(layer, shard))
        yield {name: tensor.to(context.device) for name, tensor in batch.items()}


def experts(context: Context, layer: int, start: int, stop: int) -> Result:
    """Quantize experts start..stop: gate and up on their routed tokens, then down on what those hand on.

    An expert that sees fewer than `min_expert_tokens` is calibrated with the tokens of the whole layer.
    """
    source, recipe, basis = context.source, context.recipe.weights, basis_of_experts(context, layer)
    structure = source.structures[layer].experts
    assert structure is not None
    gain, apply_gate = context.experts_gain(layer), context.apply_gate(layer)
    chosen, count = slice(start, stop), stop - start
    own = read_experts(context, layer, chosen, gain, context.rotation)
    original = read_experts(context, layer, chosen, gain, None)["gate_up"]
    outer, inner = (experts_scheme(context, layer, inner=i) for i in (False, True))
    names = [name for name, _ in source.expert_matrices(layer)]
    result: dict[str, Tensor] = {}

    sums = [Sums.zeros(source.hidden_size, context.device) for _ in range(count)]
    for batch in routed_batches(context, layer):
        source_x = rotate_rows(batch["source_x"], basis)
        for e in range(count):
            token = (batch["top_k_index"] == start + e).nonzero(as_tuple=True)[0]
            sums[e].add(as_read(batch["x"][token], outer), source_x[token])
    starved = {e for e in range(count) if sums[e].tokens < recipe.min_expert_tokens}
    info: dict[str, Any] = {
        "tokens": {start + e: sums[e].tokens for e in range(count)},
        "starved": sorted(start + e for e in starved),
        "errors": {},
    }
    gate_up = own["gate_up"]
    if outer is not None:
        saved = context.store.read(dense_key(layer), "moments.hessian", "moments.cross")
        everything = Moments(*(saved[f"moments.{k}"].to(context.device) for k in ("hessian", "cross")))
        moments = stack(
            [everything if e in starved else mixed(s.mean(), everything, recipe.all_tokens) for e, s in enumerate(sums)]
        )
        quantized = quantize(context, outer, gate_up, moments)
        gate_up = save_experts(context, names[0], chosen, quantized, result, info)
        del moments, everything
    else:
        save_plain_experts(context, names[0], chosen, gate_up, result)

    if inner is not None:
        bias = own.get("gate_up_bias")
        sums = [Sums.zeros(structure.intermediate, context.device) for _ in range(count)]
        for shard, batch in enumerate(routed_batches(context, layer)):
            for e in range(count):
                token, slot = (batch["top_k_index"] == start + e).nonzero(as_tuple=True)
                share: Tensor | None = batch["top_k_weights"][token, slot, None]
                if e in starved:
                    if shard > 0:  # one shard of windows is plenty for an expert that hardly any token reaches
                        continue
                    token, share = torch.arange(len(batch["x"]), device=context.device), None
                row_bias = None if bias is None else bias[e]
                hidden = apply_gate(F.linear(as_read(batch["x"][token], outer), gate_up[e], row_bias))
                wanted = apply_gate(F.linear(batch["source_x"][token], original[e], row_bias))
                sums[e].add(as_read(hidden, inner), hadamard_transform(wanted) if inner.hadamard else wanted, share)
        quantized = quantize(context, inner, own["down"], stack([s.mean() for s in sums]))
        save_experts(context, names[1], chosen, quantized, result, info)
    else:
        save_plain_experts(context, names[1], chosen, own["down"], result)
    for name, key in zip(names, ("gate_up_bias", "down_bias")):
        if key in own:
            save_plain_experts(context, f"{name}_bias", chosen, own[key], result)
    return result, info


def save_experts(
    context: Context, parameter: str, chosen: slice, quantized: QuantizedWeight, result: dict[str, Tensor], info: dict
) -> Tensor:
    """Add a run of experts' packed matrices to a result, by checkpoint name; returns their values [n, O, I]."""
    packed = pack(quantized.indices, quantized.codebook, quantized.step)
    for entry, expert, rows in entries_of(context, parameter, chosen):
        one = pick(packed, expert)
        part = PackedWeight(one.packed[rows], one.codebook[rows], one.step[rows], one.in_features)
        result |= packed_tensors(entry.module, part)
        info["errors"][entry.module] = float(quantized.error[expert])
    return unpack(packed).to(context.device)


def save_plain_experts(
    context: Context, parameter: str, chosen: slice, tensor: Tensor, result: dict[str, Tensor]
) -> None:
    for entry, expert, rows in entries_of(context, parameter, chosen):
        result[entry.name] = stored(context, entry.name, tensor[expert][rows])


def entries_of(context: Context, parameter: str, chosen: slice) -> Iterator[tuple[TensorSource, int, slice]]:
    """The checkpoint tensors of a run of experts: (entry, expert in the run, its rows of the fused matrix)."""
    for entry in context.source.sources[parameter]:
        expert, *rows = entry.index
        assert isinstance(expert, int)
        if chosen.start <= expert < chosen.stop:
            yield entry, expert - chosen.start, rows[0] if rows else slice(None)


def layer(context: Context, layer: int) -> Result:
    """All tensors of a finished layer: one shard of the output."""
    keys = [dense_key(layer), *(experts_key(layer, s) for s in range(len(context.expert_shards(layer))))]
    merged: dict[str, Tensor] = {}
    for key in keys:
        merged |= context.store.read(key)
    return {name: tensor for name, tensor in sorted(merged.items()) if not name.startswith("moments.")}, {}


def student(context: Context, layer: int, shard: int) -> Result:
    """One layer of the quantized model on one shard of windows, from its final tensors."""
    source, key = context.source, layer_key(layer)
    working = finished_dense(context, layer, key)
    run = None
    if (structure := source.structures[layer].experts) is not None:
        outer, inner = (experts_scheme(context, layer, inner=i) for i in (False, True))
        names = dict(zip(("gate_up", "down"), (name for name, _ in source.expert_matrices(layer))))
        widths = {"gate_up": source.hidden_size, "down": structure.intermediate}

        def read(expert: int) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for which, parameter in names.items():
                scheme = outer if which == "gate_up" else inner
                entries = [entry for entry, *_ in entries_of(context, parameter, slice(expert, expert + 1))]
                if scheme is None:
                    parts = [context.store.read_one(key, e.name).float() for e in entries]
                else:
                    parts = [unpack(read_packed(context, key, e.module, widths[which])) for e in entries]
                tensors[which] = torch.cat(parts)[None].to(context.device)
                if structure.has_bias:
                    biases = [entry for entry, *_ in entries_of(context, f"{parameter}_bias", slice(expert, expert + 1))]
                    saved = [context.store.read_one(key, e.name).float() for e in biases]
                    tensors[f"{which}_bias"] = torch.cat(saved)[None].to(context.device)
            return tensors

        quantized = experts_of(context, layer, read, inner)

        def run(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return quantized(as_read(x, outer), top_k_index, top_k_weights)

    hidden = working.run(context.hidden("student", layer, shard), run)
    return {"hidden": hidden.cpu()}, {"difference": difference(context, layer, shard, hidden)}


def difference(context: Context, layer: int, shard: int, hidden: Tensor) -> float:
    """Relative distance of the quantized model's hidden states from the source's, after this layer."""
    source = rotate_rows(context.hidden("teacher", layer + 1, shard), context.rotation)
    return float((hidden - source).norm() / source.norm())


# --- the graph -------------------------------------------------------------------------------------------------------


def dense_key(layer: int) -> str:
    return f"dense.l{layer:03d}"


def layer_key(layer: int) -> str:
    return f"layer.l{layer:03d}"


def route_key(layer: int, shard: int) -> str:
    return f"route.l{layer:03d}.w{shard:03d}"


def experts_key(layer: int, shard: int) -> str:
    return f"experts.l{layer:03d}.s{shard:03d}"


FUNCTIONS: dict[str, Callable[..., Result]] = {
    "embed": embed,
    "teacher": teacher,
    "rotation": learn_rotation,
    "ends": ends,
    "enter": enter,
    "dense": dense,
    "route": route,
    "experts": experts,
    "layer": layer,
    "student": student,
}


def graph(context: Context) -> list[Unit]:
    """Every unit of a run in topological order. Kept results are the output."""
    shards, layers = range(context.window_shards), range(context.source.num_layers)
    units = [Unit(hidden_key("teacher", 0, w), "embed", {"shard": w}) for w in shards]
    for l in layers:
        units += [
            Unit(hidden_key("teacher", l + 1, w), "teacher", {"layer": l, "shard": w}, (hidden_key("teacher", l, w),))
            for w in shards
        ]
    basis: tuple[str, ...] = ()
    if context.rotates:
        samples = tuple(hidden_key("teacher", l + 1, w) for l in layers for w in shards)
        units.append(Unit("rotation", "rotation", needs=samples, keep=True))
        basis = ("rotation",)
    units.append(Unit("ends", "ends", needs=basis, keep=True))
    units += [Unit(hidden_key("student", 0, w), "enter", {"shard": w}, ("ends",)) for w in shards]
    for l in layers:
        inputs = tuple(hidden_key(stream, l, w) for stream in ("teacher", "student") for w in shards)
        units.append(Unit(dense_key(l), "dense", {"layer": l}, (*basis, *inputs)))
        parts = [dense_key(l)]
        if runs := context.expert_shards(l):
            units += [
                Unit(
                    route_key(l, w),
                    "route",
                    {"layer": l, "shard": w},
                    (*basis, dense_key(l), hidden_key("teacher", l, w), hidden_key("student", l, w)),
                )
                for w in shards
            ]
            routed = tuple(route_key(l, w) for w in shards)
            for s, run in enumerate(runs):
                arguments = {"layer": l, "start": run.start, "stop": run.stop}
                units.append(Unit(experts_key(l, s), "experts", arguments, (*basis, dense_key(l), *routed)))
                parts.append(experts_key(l, s))
        units.append(Unit(layer_key(l), "layer", {"layer": l}, tuple(parts), keep=True))
        if l + 1 < len(layers):
            units += [
                Unit(
                    hidden_key("student", l + 1, w),
                    "student",
                    {"layer": l, "shard": w},
                    (*basis, layer_key(l), hidden_key("student", l, w), hidden_key("teacher", l + 1, w)),
                )
                for w in shards
            ]
    return units


def run_unit(context: Context, unit: Unit) -> Record:
    """Compute a unit and write its result."""
    with torch.no_grad() if unit.function != "rotation" else nullcontext():
        return measure(unit, lambda: FUNCTIONS[unit.function](context, **unit.arguments), context.store.write)
