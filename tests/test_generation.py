"""Generation: the tokens that transformers would give, streamed in pieces that add up, and timed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from codequant.data import DEMO_MODEL
from codequant.errors import InputError
from codequant.generation import Generation, generate

PROMPT = "The captain of the whale"


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_greedy_text_is_the_argmax_chain(demo) -> None:
    model, tokenizer = demo
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    prompt_tokens = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):  # without a cache, so that nothing is shared with what is tested
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    pieces: list[str] = []
    result = generate(model, tokenizer, PROMPT, 12, emit=pieces.append)
    assert result.text == "".join(pieces) == tokenizer.decode(ids[0, prompt_tokens:])
    assert len(pieces) > 3 and all(pieces)
    assert (result.prompt_tokens, result.new_tokens) == (prompt_tokens, 12)
    assert result.prompt_rate > 0 and result.decode_rate > 0


def test_sampling_depends_on_the_seed_and_leaves_the_global_one_alone(demo) -> None:
    model, tokenizer = demo
    state = torch.get_rng_state()
    first, again, other = (generate(model, tokenizer, PROMPT, 12, temperature=1.0, seed=s).text for s in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_count_the_first_token_to_the_prompt() -> None:
    result = Generation("", prompt_tokens=6, new_tokens=5, prompt_seconds=2.0, decode_seconds=8.0)
    assert (result.prompt_rate, result.decode_rate) == (3.0, 0.5)
    assert Generation("", 6, 1, 2.0, 0.0).decode_rate == 0


def test_end_of_sequence_stops_and_is_not_text(demo) -> None:
    model, tokenizer = demo
    head = model.get_output_embeddings()
    bias = torch.zeros(model.config.vocab_size)
    bias[tokenizer.eos_token_id] = 1e4
    handle = head.register_forward_hook(lambda module, args, output: output + bias)
    try:
        result = generate(model, tokenizer, PROMPT, 12)
    finally:
        handle.remove()
    assert (result.text, result.new_tokens) == ("", 1)


def test_prompts_that_cannot_be_continued_are_refused(demo) -> None:
    model, tokenizer = demo
    with pytest.raises(InputError, match="prompt: no tokens"):
        generate(model, tokenizer, "", 5)
    with pytest.raises(InputError, match="prompt: 3 tokens and 2046 new ones, expected at most 2048 together"):
        generate(model, tokenizer, "The whale was", 2046)
