"""The tokenizer of a folder as GGUF metadata, from tokenizer.json: BPE, byte-level or out of SentencePiece.

llama.cpp knows the regular expressions that split text before byte-level BPE by a name, and merges SentencePiece tokens
by a score per token instead of a rank per pair. A tokenizer for which that is not the same is refused: llama.cpp would
tokenize differently without a word.
"""

import json
import re
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


SPACE = "\u2581"
BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Raises InputError where the folder has no tokenizer.json or llama.cpp would tokenize differently."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: missing, expected the tokenizer in this form")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if (kind := tokenizer["model"]["type"]) != "BPE":
        raise InputError(f"tokenizer.json: model {kind}, expected BPE")
    tokens, types = vocabulary(tokenizer, vocab_size)
    byte_level = not tokenizer["model"].get("byte_fallback")
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space(tokenizer))
        writer.add_token_scores(scores(tokenizer, tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=byte_level, n_vocab=vocab_size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer from SentencePiece puts a space before the text; spaces become U+2581."""
    normalizer = tokenizer.get("normalizer") or {}
    pre = tokenizer.get("pre_tokenizer") or {}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if not pre and steps in ([replace], [{"type": "Prepend", "prepend": SPACE}, replace]):
        return len(steps) == 2
    if not steps and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and not pre.get("split", True):
        return pre["prepend_scheme"] != "never"
    raise InputError(
        f"tokenizer.json: normalizer {json.dumps(normalizer)} and pre_tokenizer {json.dumps(pre)}, expected those of "
        "SentencePiece for BPE with byte fallback"
    )


def scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the first pair that makes each token. llama.cpp merges any two neighbours that make a token,
    best score first: the same as merging by rank where all pairs of a token are listed, one token after the other."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in tokenizer["model"]["merges"]]
    first: dict[str, int] = {}
    highest = 0
    for rank, (left, right) in enumerate(merges):
        if first.setdefault(left + right, rank) < highest:
            raise InputError(f"tokenizer.json: pairs of token {left + right!r} are merged at different ranks")
        highest = first[left + right]
    listed = set(merges)
    for token in first:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise InputError(f"tokenizer.json: {pair} is not merged, but llama.cpp would merge it to {token!r}")
    return [-float(first.get(token, len(merges))) for token in tokens]


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text."""
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
    if tokenizer["model"].get("byte_fallback"):
        types = [TokenType.BYTE if BYTE.fullmatch(token) else kind for token, kind in zip(tokens, types)]
        if (unknown := tokenizer["model"].get("unk_token")) is not None:
            types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types
