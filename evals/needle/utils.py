"""Needles in haystacks of exact token lengths, made with the evaluated model's own tokenizer."""

from pathlib import Path

import datasets
from pydantic import TypeAdapter, ValidationError

from omniloom.errors import ConfigError, did_you_mean
from omniloom.evaluation.files import read_files
from omniloom.evaluation.needle import Grid, needle_items


def load(model, files=None, **grid):
    """Items {prompt, answer, length, depth} over `files` as haystack; `grid` holds the fields of Grid."""
    texts = [text for _, text in read_files("needle", "haystack", files)]
    for key in ("version", "config_source"):  # lm-eval's own
        grid.pop(key, None)
    for key in grid:
        if key not in Grid.__dataclass_fields__:
            raise ConfigError(f"unknown key task_args.needle.{key}; {did_you_mean(key, Grid.__dataclass_fields__)}")
    try:
        asked = TypeAdapter(Grid).validate_python(grid)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"task_args.needle.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {"test": datasets.Dataset.from_list(needle_items(texts, Path(model), asked))}
