"""Text files as documents of an lm-eval task."""

import datasets

from omniloom.evaluation.files import read_files


def load(files=None, **_):
    """Each file of `files` (paths or globs) as one document {"text": …}."""
    rows = [{"text": text} for _, text in read_files("perplexity", "text", files)]
    return {"test": datasets.Dataset.from_list(rows)}
