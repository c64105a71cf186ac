"""Continue a prompt, text as it comes, and time both halves of the work: reading the prompt and making new tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from codequant.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    text: str  # new text only
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float  # until the first new token, which comes out of the same forward pass
    decode_seconds: float  # from the first new token to the last

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first; 0 where there was only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class _TimedStreamer(TextStreamer):
    """Passes whole words on as soon as they are complete and notes when each token came."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", emit: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit
        self.times: list[float] = []  # of the prompt, before its forward pass, then of every new token

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    emit: Callable[[str], object] = lambda text: None,
) -> Generation:
    """Continue `prompt`, greedily at temperature 0, else sampled with `seed`; `emit` gets each piece of text at once.

    Raises InputError for a prompt without tokens, or too long for the model's context with what is to be generated.
    """
    ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], dtype=torch.int64, device=model.device)
    context = model.config.get_text_config().max_position_embeddings
    if ids.numel() == 0:
        raise InputError("prompt: no tokens, expected some text")
    if ids.numel() + max_new_tokens > context:
        raise InputError(
            f"prompt: {ids.numel()} tokens and {max_new_tokens} new ones, expected at most {context} together, "
            "the model's context"
        )
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        emit(text)

    streamer = _TimedStreamer(tokenizer, take)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.generate(  # type: ignore[operator]  # a mixin's method, which PreTrainedModel does not declare
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
        )
    start, first, *_ = streamer.times
    return Generation(
        text="".join(pieces),
        prompt_tokens=ids.numel(),
        new_tokens=len(streamer.times) - 1,
        prompt_seconds=first - start,
        decode_seconds=streamer.times[-1] - first,
    )
