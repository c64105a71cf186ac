"""The vocabulary of every stage: a decoder layer as sites, normed inputs, writers and channel pairs.

Stages never ask which model they work on. `discovery.py` derives these facts from the model itself.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A norm that reads the residual stream. Its output is gain * normalize(x) + bias."""

    path: str  # module path inside the layer; "model.norm"-like full path for the final norm
    centered: bool  # LayerNorm: subtracts the mean over channels first
    unit_offset: bool  # the gain is 1 + weight
    has_bias: bool


@dataclass(frozen=True)
class Site:
    """One tensor that linear maps read. Maps that read the same tensor share its statistics and its quantization."""

    readers: tuple[str, ...]  # module paths, in execution order; never an experts module
    norm: Norm | None  # the residual norm that produced the tensor, None for an inner one (input of o, down, kv_b)


@dataclass(frozen=True)
class ChannelPair:
    """Channels written by rows of the producers and read by columns of the consumer, one to one or one to many.

    Column j of the consumer reads row `row_of_column[j]` of every producer. Inside blocks of `block`
    consecutive columns channels may be mixed freely (permuted; rotated if `linear`), as long as the rows that a block
    reads are mixed with it.
    """

    producers: tuple[str, ...]
    consumer: str
    row_of_column: Tensor  # int64 [consumer columns]
    block: int  # head dimension for v/o, the whole width for gate/up/down
    linear: bool  # no nonlinearity in between: any orthogonal mix is allowed, not only permutations


@dataclass(frozen=True)
class ExpertsStructure:
    """The experts module of a layer (transformers' `@use_experts_implementation` flags)."""

    path: str
    router: str | None
    num_experts: int
    intermediate: int
    is_concatenated: bool
    is_transposed: bool
    has_gate: bool
    has_bias: bool


@dataclass(frozen=True)
class LayerStructure:
    """Everything the stages need to know about one decoder layer. Paths are relative to the layer."""

    sites: tuple[Site, ...]  # execution order
    norms: tuple[Norm, ...]
    routers: tuple[str, ...]  # readers whose outputs choose experts
    writers: tuple[str, ...]  # linear maps whose output is added to the residual stream; not the experts
    pairs: tuple[ChannelPair, ...]
    experts: ExpertsStructure | None
    experts_norm: Norm | None  # the norm whose output the experts read
    obstacles: tuple[str, ...]  # reasons why the residual stream of this layer cannot be rotated; usually empty

    def site_of(self, reader: str) -> Site:
        return next(site for site in self.sites if reader in site.readers)
