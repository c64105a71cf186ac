"""Source models on disk for tests: random weights of a family and a byte-sized tokenizer."""

from pathlib import Path

from helpers import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = "</s> <unk> <pad> " + " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,")
TEXT = "\n\n\n".join(
    f"The {animal} of document {n} looks for {food}, finds {n * 37} of them and goes home at {n % 12}."
    for n, (animal, food) in enumerate(
        [("fox", "grapes"), ("bear", "honey"), ("crow", "cheese"), ("ant", "crumbs")] * 8
    )
)
SMALL = ["calibration.windows=6", "calibration.length=16", "calibration.windows_per_unit=2", "rotation.steps=3"]
"""Overrides that make a run take a second."""


def write_tokenizer(folder: Path) -> None:
    """One token per character; 67 tokens or fewer, the vocabulary of every tiny model."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY.split()[:67])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def write_source(family: str, folder: Path, **kwargs) -> Path:
    """A random model of the family in float32 with its tokenizer, in sharded safetensors under per-expert names."""
    random_model(family).save_pretrained(folder, **{"max_shard_size": "60KB", **kwargs})
    write_tokenizer(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder
