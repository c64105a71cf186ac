"""lm-eval tasks on models in memory: accuracies with their standard errors, for the quantized model and its source."""

import difflib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from codequant.errors import InputError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = {"cpu": 8, "cuda": 64}  # requests at a time, by device; lm-eval sorts them by length
SEED = 1234  # of the choice of few-shot examples, lm-eval's own


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None  # None where lm-eval has no formula for it


@dataclass(frozen=True)
class TaskScores:
    examples: int
    metrics: dict[str, Score]


class Tasks:
    """Chosen tasks, found and checked before any model is loaded: lm-eval's own, or those of a local folder."""

    def __init__(self, names: list[str], folder: Path | None = None) -> None:
        """Raises InputError where lm-eval is missing or does not know a name."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError("tasks: lm-eval is not installed, `pip install 'codequant[eval]'` installs it") from error
        if folder is not None and not folder.is_dir():
            raise InputError(f"task folder: {folder} is no folder, expected one with lm-eval task files")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every default that it takes
        self.manager = TaskManager(include_path=folder, include_defaults=folder is None)
        self.names = names
        known = self.manager.all_subtasks
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or known[:10]
                raise InputError(f"tasks: {name!r}, expected tasks that lm-eval knows, such as {', '.join(near)}")

    def run(
        self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", limit: int | None = None
    ) -> TaskScores:
        """Score a model on one task, on its first `limit` examples if given."""
        from lm_eval.evaluator import evaluate

        loaded = self.manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=SEED)
        found = evaluate(quiet_model(model, tokenizer), loaded, limit=limit, log_samples=False)
        assert found is not None  # it is None on the other ranks of a distributed run
        return TaskScores(found["n-samples"][name]["effective"], scores(found["results"][name]))


def quiet_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "HFLM":
    """lm-eval's view of a model, without progress bars, which would mix with ours."""
    from lm_eval.models.huggingface import HFLM

    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH[model.device.type])
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(judged, name, partial(getattr(judged, name), disable_tqdm=True))
    return judged


def score(
    tasks: Tasks,
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None = None,
    update: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """{task: {"examples", "quantized": {metric: {"value", "stderr"}}, "reference": the same or None}}.

    update(what is done, done, total) is called before every run of a task.
    """
    models = {"quantized": model} | ({"reference": reference} if reference is not None else {})
    runs = [(name, which) for name in tasks.names for which in models]
    found: dict[str, dict[str, Any]] = {name: {"reference": None} for name in tasks.names}
    for done, (name, which) in enumerate(runs):
        update(f"{name}, {which} model", done, len(runs))
        scored = asdict(tasks.run(name, models[which], tokenizer, limit))
        found[name] |= {"examples": scored["examples"], which: scored["metrics"]}
    return found


def render(found: dict[str, dict[str, Any]]) -> Table:
    """What `score` found, for people, in percent."""
    table = Table("task", "metric", "quantized", "reference", "examples", box=None, pad_edge=False)
    for name, row in found.items():
        for metric, value in row["quantized"].items():
            error = f" ± {100 * value['stderr']:.1f}" if value["stderr"] is not None else ""
            reference = f"{100 * row['reference'][metric]['value']:.1f}" if row["reference"] is not None else ""
            table.add_row(name, metric, f"{100 * value['value']:.1f}{error}", reference, f"{row['examples']:,}")
    return table


def scores(results: dict[str, Any]) -> dict[str, Score]:
    """lm-eval's flat `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}` by metric; `none` is no filter and goes."""
    found = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{name}")
        shown = metric if name == "none" else f"{metric} ({name})"
        found[shown] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return found
