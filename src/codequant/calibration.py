"""Text to token windows: what calibration statistics and perplexities are computed on.

Documents are joined into one stream of tokens with an end-of-sequence token behind each, and the stream is cut into
windows of equal length. Nothing is ever padded: padding tokens would enter every mean, range and second moment (in the
published method they are a tenth of all tokens). Only the last, incomplete window is dropped.

Letters: D documents, L tokens in the stream, W windows in the stream, N windows chosen, T tokens per window.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codequant.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n\n"
BATCH = 64  # documents at a time: a tokenizer takes hundreds of bytes for each token that it returns


def read_documents(path: str | Path, whole: bool = False) -> list[str]:
    """The documents of a UTF-8 text file, separated by three newlines, or of a .jsonl file, each line's "text".

    whole: a text file is one document, as it stands. Raises InputError where the file is missing, unreadable, not
    UTF-8, malformed (with the line) or without text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig drops a byte order mark, which would become a token
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a text or .jsonl file") from None
    if path.suffix == ".jsonl":
        documents = _stripped(_json_texts(path, text))
    else:
        documents = [text] if whole and text.strip() else split_documents(text)
    if not documents:
        raise InputError(f"{path}: no text, expected documents separated by three newlines, or .jsonl with 'text' keys")
    return documents


def split_documents(text: str) -> list[str]:
    """Documents separated by three newlines, none of them empty."""
    return _stripped(text.split(SEPARATOR))


def _stripped(pieces: Sequence[str]) -> list[str]:
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _json_texts(path: Path, lines: str) -> list[str]:
    texts = []
    for number, line in enumerate(lines.split("\n"), start=1):  # splitlines() would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: {error.msg}, expected one JSON object per line") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f"{path}: line {number}: no 'text' string, expected one in every object")
        texts.append(record["text"])
    return texts


def token_stream(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor]:
    """All documents' tokens, int64 [L], and where in it each document ends, int64 [D], end-of-sequence included."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Tensor] = []
    for start in range(0, len(documents), BATCH):
        # verbose=False: documents longer than the model's context are cut here, no warning is due.
        batch = tokenizer(list(documents[start : start + BATCH]), add_special_tokens=False, verbose=False)
        parts += [torch.tensor(ids + separator, dtype=torch.int64) for ids in batch["input_ids"]]
    ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)
    return torch.cat(parts), ends


def consecutive_windows(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> Tensor:
    """The whole text in order, int64 [W, T = length], for perplexity. Raises InputError where it fills no window."""
    stream, _ = token_stream(documents, tokenizer)
    return _cut(stream, length)


def windows(
    documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int = 0
) -> Tensor:
    """int64 [N, T]: `count` windows of `length` tokens from as many different documents as possible.

    Windows are drawn at random, one from each document before a second from any (a window belongs to the document of
    its first token), so every prefix of the result is as diverse as it can be. A text with fewer windows gives them all
    and a warning. Raises InputError where the text fills no window.
    """
    stream, ends = token_stream(documents, tokenizer)
    cut = _cut(stream, length)  # [W, T]
    if len(cut) < count:
        logger.warning("text: %d windows of %d tokens, fewer than the %d asked for", len(cut), length, count)
    document = torch.searchsorted(ends, torch.arange(len(cut)) * length, right=True)  # [W]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
    taken: Counter[int] = Counter()
    turn = []  # of each window in `order`: how many of its document's windows come before it
    for owner in document[order].tolist():
        turn.append(taken[owner])
        taken[owner] += 1
    return cut[order[torch.tensor(turn).argsort(stable=True)[:count]]]


def _cut(stream: Tensor, length: int) -> Tensor:
    if len(stream) < length:
        raise InputError(f"text: {len(stream)} tokens, expected at least {length}, which is one window")
    return stream[: len(stream) // length * length].view(-1, length)


def content_hash(windows: Tensor) -> str:
    """SHA-256 of the token ids and their shape, the same on every machine; it names a calibration set."""
    shape = "x".join(map(str, windows.shape))
    return hashlib.sha256(f"{shape}:".encode() + windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()
