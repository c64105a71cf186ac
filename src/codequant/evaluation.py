"""How far a quantized model is from its reference, on windows of real tokens.

The protocol is the usual one: non-overlapping windows of one context length, every token but a window's first is
predicted, losses in float32 whatever the model's dtype (a loss in bfloat16 moves perplexity by almost one percent).
Perplexity alone hides errors that cancel, so each token's whole distribution is compared as well: KL(reference ||
quantized) in nats. What happened inside is measured by the router's choices and the layers' outputs.

Letters: N windows of T tokens, B of them in a batch, V vocabulary, H hidden channels, k experts per token.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from codequant.errors import InputError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bounds on memory, not on results: logits held at once per model, and logits turned into float32 at once.
BATCH_LOGITS = 2**24
CHUNK_LOGITS = 2**22


@dataclass(frozen=True)
class LayerDifference:
    layer: int
    error: float  # mean over tokens of |h_quantized - h_reference| / |h_reference|, h being the layer's output
    router_change: float | None  # share of tokens sent to another set of experts; None where nothing is routed


@dataclass(frozen=True)
class Evaluation:
    """Numbers over all scored tokens; those that need a reference are None without one."""

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None  # nats per token
    router_change: float | None = None  # mean over the routed layers
    bits_per_weight: float | None = None  # over all parameters of the checkpoint, quantized or not
    layers: tuple[LayerDifference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Trace:
    """What a forward pass leaves behind, by decoder layer."""

    output: dict[int, Tensor] = field(default_factory=dict)  # [B, T, H]
    experts: dict[int, Tensor] = field(default_factory=dict)  # integer [B * T, k]


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The model's list of decoder layers, whatever it is called."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__}: no list of {count} decoder layers, expected one in its decoder")


@contextmanager
def traced(model: "PreTrainedModel") -> Iterator[Trace]:
    """Record layer outputs and routing decisions of the forward passes made inside the `with` block.

    The decisions are read where every family passes them: as second argument of the module named `experts`.
    """
    trace = Trace()

    def keep_output(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace.output[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_experts(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if len(args) > 1 and not args[1].is_floating_point():
                trace.experts[layer] = args[1]

        return hook

    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        handles.append(layer.register_forward_hook(keep_output(index)))
        for name, module in layer.named_modules():
            if name.split(".")[-1] == "experts":
                handles.append(module.register_forward_pre_hook(keep_experts(index)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def set_changes(chosen: Tensor, reference: Tensor) -> Tensor:
    """Where two choices of experts, integer [tokens, k], differ as sets: bool [tokens]."""
    return (chosen.sort(-1).values != reference.sort(-1).values).any(-1)


def relative_errors(output: Tensor, reference: Tensor, rotation: Tensor | None) -> Tensor:
    """|output - reference @ rotation| / |reference @ rotation| of every token, float32 [...], of tensors [..., H].

    Per token and not over all of them, because the first tokens of a window are a thousand times larger than the rest
    in many models and would be all that such a ratio sees.
    """
    reference = reference.float()
    if rotation is not None:
        reference = reference @ rotation
    return (output.float() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def load_reference(folder: Path, device: str) -> "PreTrainedModel":
    """A source model, unquantized, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device, trust_remote_code=False)


def context_length(model: "PreTrainedModel", wanted: int) -> int:
    """The wanted window length, or the model's longest context where that is shorter."""
    return min(wanted, model.config.get_text_config().max_position_embeddings)


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    windows: Tensor,
    reference: "PreTrainedModel | None" = None,
    rotation: Tensor | None = None,
    bits_per_weight: float | None = None,
    advance: Callable[[int], object] = lambda windows: None,
) -> Evaluation:
    """Evaluate `model` on windows int64 [N, T], T > 1, and compare it with `reference` where one is given.

    `rotation` float32 [H, H] maps the reference's residual stream to the model's: h_model ~ h_reference @ rotation.
    `bits_per_weight` is passed through. `advance` is called with the number of windows done since its last call.
    Raises InputError for windows longer than the model's context, VerificationError for logits that are not finite.
    """
    N, T = windows.shape
    config = model.config.get_text_config()
    if T > config.max_position_embeddings:
        raise InputError(f"windows: {T} tokens, expected at most {config.max_position_embeddings}, the model's context")
    if rotation is not None:
        rotation = rotation.to(model.device, torch.float32)
    loss = reference_loss = divergence = 0.0
    errors: dict[int, float] = {}
    changes: dict[int, float] = {}
    for batch in windows.split(max(1, BATCH_LOGITS // (T * config.vocab_size))):
        targets = batch[:, 1:].to(model.device)
        with traced(model) as trace:
            logits = _predictions(model, batch)  # [B, T - 1, V]
        if reference is None:
            for part, target in _chunks(logits, targets):
                loss += float(_losses(part.float().log_softmax(-1), target))
        else:
            with traced(reference) as reference_trace:
                reference_logits = _predictions(reference, batch).to(model.device)
            for part, expected, target in _chunks(logits, reference_logits, targets):
                p, q = expected.float().log_softmax(-1), part.float().log_softmax(-1)
                loss += float(_losses(q, target))
                reference_loss += float(_losses(p, target))
                divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            for layer, output in trace.output.items():
                ratios = relative_errors(output, reference_trace.output[layer].to(model.device), rotation)
                errors[layer] = errors.get(layer, 0.0) + float(ratios.sum(dtype=torch.float64))
            for layer, chosen in trace.experts.items():
                changed = set_changes(chosen, reference_trace.experts[layer].to(model.device))
                changes[layer] = changes.get(layer, 0.0) + float(changed.sum())
        advance(len(batch))

    scored = N * (T - 1)
    if not math.isfinite(loss + reference_loss):
        raise VerificationError(f"logits: loss {loss:g} (reference {reference_loss:g}), expected finite logits")
    if reference is None:
        return Evaluation(scored, math.exp(loss / scored), bits_per_weight=bits_per_weight)
    return Evaluation(
        tokens=scored,
        perplexity=math.exp(loss / scored),
        reference_perplexity=math.exp(reference_loss / scored),
        kl=divergence / scored,
        router_change=sum(changes.values()) / (len(changes) * N * T) if changes else None,
        bits_per_weight=bits_per_weight,
        layers=tuple(
            LayerDifference(layer, total / (N * T), changes[layer] / (N * T) if layer in changes else None)
            for layer, total in sorted(errors.items())
        ),
    )


def _predictions(model: "PreTrainedModel", batch: Tensor) -> Tensor:
    """Logits [B, T - 1, V] for every token of batch [B, T] but each window's first, in the model's dtype."""
    return model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows: [rows, V] of logits [B, T - 1, V] with the same rows of the others [B, T - 1, ...]."""
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    for window in zip(logits, *others, strict=True):
        yield from zip(*(tensor.split(rows) for tensor in window), strict=True)


def _losses(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Sum of the negative log likelihoods of target [rows] under float32 [rows, V], accumulated in float64."""
    return -log_probabilities.gather(-1, target.unsqueeze(-1)).sum(dtype=torch.float64)


def render(evaluation: Evaluation) -> Table:
    """The numbers as a table for people; what was not measured has no row."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    reference = evaluation.reference_perplexity
    if reference is None:
        table.add_row("perplexity", f"{evaluation.perplexity:.3f}")
    else:
        change = f"{evaluation.perplexity / reference - 1:+.2%} against {reference:.3f}"
        table.add_row("perplexity", f"{evaluation.perplexity:.3f}", change)
    if evaluation.kl is not None:
        table.add_row("KL divergence", f"{evaluation.kl:.5f}", "nats per token, reference to quantized")
    if evaluation.router_change is not None:
        table.add_row("router change", f"{evaluation.router_change:.2%}", "tokens sent to another set of experts")
    if evaluation.layers:
        worst = max(evaluation.layers, key=lambda layer: layer.error)
        table.add_row("layer error", f"{worst.error:.2%}", f"of the output's norm in layer {worst.layer}, the worst")
    if evaluation.bits_per_weight is not None:
        table.add_row("bits per weight", f"{evaluation.bits_per_weight:.2f}", "all parameters counted")
    table.add_row("tokens", f"{evaluation.tokens:,}", "scored")
    return table
