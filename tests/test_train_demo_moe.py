"""The training script of the demo model: it learns, and what it writes loads as the architecture it claims."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import load_example
from transformers import AutoModelForCausalLM, AutoTokenizer

from codequant.data import DEMO_HELDOUT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("train_demo_moe")


def test_balance_loss_is_one_when_even_and_large_when_collapsed(script: ModuleType) -> None:
    E, top_k = 6, 2
    even = 50 * torch.eye(E) + 50 * torch.eye(E).roll(1, 1)  # every expert is chosen by two of the six tokens
    assert float(script.balance_loss(even, top_k)) == pytest.approx(1, abs=1e-6)
    collapsed = torch.tensor([[50.0, 50.0, 0, 0, 0, 0]]).repeat(7, 1)
    assert float(script.balance_loss(collapsed, top_k)) == pytest.approx(E / top_k, abs=1e-6)


def test_learning_rate_warms_up_then_falls_to_its_floor(script: ModuleType) -> None:
    rates = [script.learning_rate(step, 1000, 1.0) for step in range(1001)]
    assert rates[0] < 0.01 and max(rates) == max(rates[100:300])
    assert rates[-1] == pytest.approx(script.FINAL_LEARNING_RATE)


def test_training_learns_and_writes_a_model_folder(script: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = ["--steps", "20", "--batch", "4", "--context", "32", "--learning-rate", "3e-2"]
    script.main([str(tmp_path), "--text", str(DEMO_HELDOUT), "--heldout", str(DEMO_HELDOUT), *options])
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["heldout_loss"] < math.log(8192) - 0.5  # better than knowing nothing by far more than noise

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and model.config.model_type == "qwen3_moe"
    window = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("My fellow citizens, ")["input_ids"]])
    assert bool(model(window).logits.isfinite().all())
