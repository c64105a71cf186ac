"""Runs prompts through vLLM in this process and writes what it said: `python engine.py REQUEST.json`.

A process of its own for each engine: vLLM keeps global state and takes the process down when it fails.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from vllm import LLM


class Recording:
    """What each forward pass from now on gives to the output projections of attention, and how it routes tokens."""

    def __init__(self, engine: "LLM") -> None:
        from codequant.serving.vllm import CodequantExpertsMethod

        self.passes: dict[str, list[Tensor]] = defaultdict(list)
        engine.apply_model(self.listen)
        compute = CodequantExpertsMethod.compute

        def keep_routing(method: Any, layer: nn.Module, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
            self.passes[f"{method.prefix}.index"].append(index.clone())
            self.passes[f"{method.prefix}.weights"].append(weights.clone())
            return compute(method, layer, x, weights, index)

        CodequantExpertsMethod.compute = keep_routing  # type: ignore[method-assign]

    def listen(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith(".o_proj"):
                passes = self.passes[name]
                module.register_forward_pre_hook(lambda _, inputs, passes=passes: passes.append(inputs[0].clone()))

    def by_prompt(self, prompts: int) -> dict[str, Tensor]:
        """[prompts, length, ...] of prompts that went through every pass together."""
        return {
            name: torch.cat([tensor.unflatten(0, (prompts, -1)) for tensor in passes], dim=1)
            for name, passes in self.passes.items()
        }


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(request["folder"], dtype="float32", max_num_seqs=32, **request["options"])
    recording = Recording(engine) if request["record"] else None
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
    if recording is not None:
        save_file(recording.by_prompt(len(prompts)), request["record"])


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main()
