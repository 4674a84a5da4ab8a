"""Text files as documents of an lm-eval task."""

from glob import glob
from pathlib import Path

import datasets

from omniloom.errors import ConfigError, DataError


def load(files=None, **_):
    """Each file of `files` (paths or globs) as one document {"text": …}."""
    if not files:
        raise ConfigError("task perplexity has no text: set task_args.perplexity.files=[…]")
    patterns = [files] if isinstance(files, str) else files
    rows = []
    for pattern in patterns:
        paths = sorted(glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"task perplexity: no file matches {pattern}")
        for path in paths:
            try:
                rows.append({"text": Path(path).read_text(encoding="utf-8")})
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"task perplexity cannot read {path}: {error}") from error
    return {"test": datasets.Dataset.from_list(rows)}
