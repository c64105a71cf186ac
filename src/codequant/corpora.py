"""Texts to evaluate on: local files, or the usual data sets by name, joined into one text as their protocols say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codequant.calibration import read_documents, split_documents
from codequant.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Arguments of `datasets.load_dataset`, and how the rows' texts become one."""

    arguments: dict[str, Any]
    join: Callable[[list[str]], str]


CORPORA = {
    "wikitext2": Corpus(
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        "\n\n".join,
    ),
    # 1100 documents of the first validation shard, as GPTQ's evaluation takes them: about 256 windows of 2048 tokens.
    "c4": Corpus(
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation[:1100]",
        },
        " ".join,
    ),
}


def evaluation_documents(name_or_file: str | Path, whole: bool) -> list[str]:
    """The documents of a local file or a data set in CORPORA; `whole`: everything as one document, as it stands.

    Raises InputError where there is no such file or the data set cannot be fetched.
    """
    if (corpus := CORPORA.get(str(name_or_file))) is None or Path(name_or_file).is_file():
        return read_documents(name_or_file, whole)
    text = corpus.join(fetch(str(name_or_file), corpus.arguments))
    return [text] if whole else split_documents(text)


def fetch(name: str, arguments: dict[str, Any]) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"text: {name} needs `pip install 'codequant[eval]'`, or give a local file") from error
    try:
        return list(load_dataset(**arguments)["text"])
    except (OSError, ValueError) as error:  # no network, no such revision
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"text: {name} cannot be fetched ({reason}), expected a network or a local file") from error
