"""Runs prompts through vLLM in this process and writes what it said: `python engine.py REQUEST.json`.

A process of its own for each engine: vLLM keeps global state and takes the process down when it fails.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(request["folder"], dtype="float32", max_num_seqs=32, **request["options"])
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], prompt_logprobs=0, logprobs=0, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    answers = []
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        completion = output.outputs[0]
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        entries = [*output.prompt_logprobs[1:], *completion.logprobs]  # the first token has no probability
        log_probabilities = [entry[token].logprob for token, entry in zip(tokens[1:], entries)]
        answers.append({"tokens": tokens, "log_probabilities": log_probabilities})
    Path(request["answer"]).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main()
