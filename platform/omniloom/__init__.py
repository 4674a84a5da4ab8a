"""Omniloom: text, images, audio and video in one token sequence; sparse transformers trained on it.

From Python: `omniloom.load(path)` gives a model, `omniloom.evaluate(model, tasks=[…])` its scores.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniloom.model.load import Model

__all__ = ["evaluate", "load"]


def load(path: str | Path) -> "Model":
    """Load a run, a checkpoint or a model folder; raises CheckpointError saying what is missing."""
    from omniloom.model.load import load_model

    return load_model(Path(path))


def evaluate(model: "Model", tasks: list[str], **options: Any) -> dict[str, dict[str, Any]]:
    """Score a loaded model on lm-eval tasks, in this process; results by task, as evals/<task>.json has them."""
    from omniloom.compose import resource_folder
    from omniloom.evaluation.harness import evaluate as evaluate_here

    return evaluate_here(model, tasks, resource_folder("evals"), **options)
