"""Omniloom: text, images, audio and video in one token sequence; sparse transformers trained on it.

From Python: `omniloom.load(path)` gives a model, `model.write("Which digit is this? {image:seven.png}")` what it says,
`omniloom.evaluate(model, tasks=[…])` its scores.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniloom.generate.model import WritingModel

__all__ = ["evaluate", "load"]


def load(path: str | Path) -> "WritingModel":
    """Load a run, a checkpoint or a model folder; raises CheckpointError saying what is missing."""
    from omniloom.generate.model import load as load_here

    return load_here(Path(path))


def evaluate(model: "WritingModel", tasks: list[str], **options: Any) -> dict[str, dict[str, Any]]:
    """Score a loaded model on lm-eval tasks, in this process; results by task, as evals/<task>.json has them."""
    from omniloom.compose import resource_folder
    from omniloom.evaluation.harness import evaluate as evaluate_here

    return evaluate_here(model, tasks, resource_folder("evals"), **options)
