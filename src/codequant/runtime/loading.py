"""`codequant.load`: a quantized folder as a model that computes on packed weights, and its tokenizer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from codequant.errors import InputError
from codequant.verification import check_tensors


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder written by codequant.

    dtype: of activations and of what is not quantized; the source model's by default. device: "cpu" by default. Raises
    InputError or VerificationError, before any weight is read, where the folder is not whole; never runs remote code.
    """
    check_tensors(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", device_map=device, trust_remote_code=False, local_files_only=True
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer, expected its files beside the weights") from error
    return model, tokenizer
