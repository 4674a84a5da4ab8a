"""Run lm-eval tasks on our models, each with its controls, and put the scores into the contract's form."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from omniloom.errors import ConfigError, DataError, did_you_mean
from omniloom.evaluation.baseline import UnigramLM
from omniloom.evaluation.lm import OmniloomLM
from omniloom.evaluation.media import PLACEHOLDERS, split_prompt
from omniloom.modality.text import load_tokenizer
from omniloom.model.load import Model, load_model

Variant = Literal["kept", "removed", "shuffled", "unigram"]
COUNTS_FILE = "target_counts.json"
SAMPLES_KEPT = 32  # of each task, spread over its documents


@dataclass
class Item:
    """One task under one variant: the model as it is, a medium removed or shuffled, or the unigram in its place."""

    task: str
    variant: Variant
    model: str  # folder
    task_args: dict[str, Any] = field(default_factory=dict)
    tasks_folder: str = ""
    batch_tokens: int = 8_192
    limit: int | None = None


@dataclass
class Scores:
    """What lm-eval answered for one item: (value, standard error) by metric."""

    task: str
    variant: Variant
    n: int
    metrics: dict[str, tuple[float, float | None]]
    chance: float | None
    samples: list[dict[str, Any]] = field(default_factory=list)  # what was asked and answered, of some documents


def task_manager(item: Item) -> Any:
    """lm-eval's manager that knows the item's task: ours from `tasks_folder`, else lm-eval's own of that name."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"model": item.model, **item.task_args}
    manager = TaskManager(include_path=item.tasks_folder, include_defaults=False, metadata=dict(metadata))
    if item.task not in manager.all_tasks:
        ours = list(manager.all_tasks)
        manager = TaskManager(include_path=item.tasks_folder, metadata=dict(metadata))
        if item.task not in manager.all_tasks:
            raise ConfigError(f"unknown task {item.task}; {did_you_mean(item.task, [*manager.all_tasks, *ours])}")
    return manager


def variants_of(item: Item) -> list[Variant]:
    """The variants a task calls for: controls for its media, a unigram for plain text."""
    manager = task_manager(item)
    tasks = manager.load([item.task])["tasks"].values()  # several where the name is a group
    if all(task.config.doc_to_image is not None or task.config.doc_to_audio is not None for task in tasks):
        return ["kept", "removed", "shuffled"]
    has_counts = (Path(item.model) / COUNTS_FILE).is_file()
    is_text = all(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in tasks)
    return ["kept", "unigram"] if is_text and has_counts else ["kept"]


def evaluate_item(item: Item) -> Scores:
    """Load the model and score one task under one variant."""
    return _evaluate(item, load_model(Path(item.model)))


def _evaluate(item: Item, model: Model) -> Scores:
    lm: LM
    if item.variant == "unigram":
        counts = json.loads((model.folder / COUNTS_FILE).read_text())
        lm = UnigramLM(load_tokenizer(model.folder / "tokenizer.json"), counts)
    else:
        lm = OmniloomLM(model, item.batch_tokens, item.variant)
    manager = task_manager(item)
    answer = simple_evaluate(
        lm, tasks=[item.task], task_manager=manager, limit=item.limit, log_samples=True, bootstrap_iters=1_000
    )
    if answer is None or item.task not in answer["results"]:
        raise DataError(f"lm-eval gave no result for task {item.task}")
    samples = [sample for group in answer["samples"].values() for sample in group]
    # No whole stride: it would show one answer alone where answers take turns.
    kept = sorted({i * len(samples) // SAMPLES_KEPT for i in range(SAMPLES_KEPT)})
    return Scores(
        item.task,
        item.variant,
        len(samples),
        _metrics(answer["results"][item.task]) | _cells(samples),
        _chance(samples),
        [_sample(samples[i]) for i in kept],
    )


def _metrics(result: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm-eval's `name,filter` and `name_stderr,filter` as name → (value, stderr)."""
    found = {}
    for key, value in result.items():
        name, _, filter_name = key.partition(",")
        if filter_name and not name.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{name}_stderr,{filter_name}")
            found[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found


def _cells(samples: list[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Recall by length and depth, as `acc/<length>/<depth>`, where documents have both."""
    cells: dict[str, list[float]] = {}
    for sample in samples:
        if {"length", "depth"} <= sample["doc"].keys():
            name = f"acc/{sample['doc']['length']}/{sample['doc']['depth']:g}"
            cells.setdefault(name, []).append(float(sample["acc"]))
    # One alone has no spread.
    return {name: (mean(hits), mean_stderr(hits) if len(hits) > 1 else None) for name, hits in cells.items()}


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """One document as the report shows it: prompt, choices, right answer, given answer."""
    context, *_ = first = sample["arguments"][0]
    held = first[2] if len(first) > 2 else {}
    media = {name: iter(held.get(name, [])) for name in ("visual", "audio")}
    prompt: list[dict[str, str]] = []
    for part in split_prompt(context):
        if part in PLACEHOLDERS:
            kind, argument = PLACEHOLDERS[part]
            prompt.append({kind: str(next(media[argument], ""))})
        elif part:
            prompt.append({"text": part})
    answers = [arguments[1].strip() for arguments in sample["arguments"]] if len(first) > 1 else []
    scored = [response for response in sample["filtered_resps"] if isinstance(response, list | tuple)]
    shown = {"doc_id": sample["doc_id"], "prompt": prompt, "choices": [], "answer": None, "given": None, "right": None}
    if len(answers) > 1 and len(scored) == len(answers) and isinstance(sample["target"], int):
        given = max(range(len(scored)), key=lambda i: scored[i][0])
        shown |= {"choices": answers, "answer": answers[sample["target"]], "given": answers[given]}
        shown["right"] = given == sample["target"]
    elif len(answers) == 1 and scored:
        right = bool(scored[0][1])
        shown |= {"answer": answers[0], "given": answers[0] if right else None, "right": right}
    return shown | {key: sample["doc"][key] for key in ("length", "depth") if key in sample["doc"]}


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Mean of 1 / choices over the documents of a multiple-choice task, else None."""
    counts = [len(sample["arguments"]) for sample in samples if len(sample["arguments"]) > 1]
    return sum(1 / count for count in counts) / len(counts) if counts and len(counts) == len(samples) else None


def gather(scores: list[Scores], step: int | None) -> dict[str, dict[str, Any]]:
    """One result a task: {task, step, n, metrics: {name: {value, stderr, chance, control}}}."""
    results: dict[str, dict[str, Any]] = {}
    for main in (s for s in scores if s.variant == "kept"):
        controls = [s for s in scores if s.task == main.task and s.variant != "kept"]
        results[main.task] = {
            "task": main.task,
            "step": step,
            "n": main.n,
            "metrics": {
                name: {
                    "value": value,
                    "stderr": stderr,
                    "chance": main.chance if name.startswith("acc") else None,
                    "control": {c.variant: c.metrics[name][0] for c in controls if name in c.metrics},
                }
                for name, (value, stderr) in main.metrics.items()
            },
        }
    return results


def evaluate(
    model: Model,
    tasks: list[str],
    tasks_folder: Path,
    task_args: dict[str, dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Score a loaded model in this process; `options` are fields of Item."""
    scores = []
    for task in tasks:
        item = Item(task, "kept", str(model.folder), (task_args or {}).get(task, {}), str(tasks_folder), **options)
        for variant in variants_of(item):
            item.variant = variant
            scores.append(_evaluate(item, model))
    return gather(scores, step=None)
