"""The tokenizer of a folder as GGUF metadata: byte-level BPE, from tokenizer.json.

llama.cpp knows the regular expressions that split text before BPE by a name. A tokenizer that splits in a way without a
name here is refused: it would tokenize differently without a word.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from codequant.errors import InputError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # what comes before the byte-level step -> llama.cpp's name (llama-vocab.cpp)
    ("gpt-2 regex",): "gpt-2",
    ("single digits", "gpt-2 regex"): "smollm",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Raises InputError where the folder has no tokenizer.json or llama.cpp would tokenize differently."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: missing, expected the tokenizer in this form")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    pre = pre_tokenizer_name(tokenizer)
    tokens, types = vocabulary(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = model["type"] + " with byte fallback" * bool(model.get("byte_fallback"))
        raise InputError(f"tokenizer.json: model {kind}, expected byte-level BPE")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes text to be in NFC
        raise InputError(f"tokenizer.json: normalizer {normalizer!r}, expected none or 'NFC'")
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    splits = tuple(split for step in steps if (split := _split(step)) is not None)
    if splits not in SPLITS or steps[-1].get("type") != "ByteLevel":
        raise InputError(f"tokenizer.json: pre_tokenizer {json.dumps(pre)} has no name in llama.cpp that is known here")
    return SPLITS[splits]


def _split(step: dict[str, Any]) -> str | None:
    """What one pre-tokenizer does, in the terms of SPLITS; None for mapping bytes to characters alone."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "gpt-2 regex" if use_regex else None
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
    return json.dumps(step)


def vocabulary(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of every token id below vocab_size; ids that the tokenizer does not use are filled up."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
    for text, i in (tokenizer["model"]["vocab"] | added).items():
        if i >= vocab_size:
            raise InputError(f"tokenizer.json: token {text!r} has id {i}, expected one below vocab_size {vocab_size}")
        tokens[i], types[i] = text, TokenType.NORMAL
    for entry in tokenizer.get("added_tokens", ()):
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    return tokens, types
