"""Questions about pictures, from jsonl files of {image, question, choices, answer}."""

import json
from glob import glob
from pathlib import Path

import datasets

from omniloom.errors import ConfigError, DataError, did_you_mean

KEYS = ("image", "question", "choices", "answer")


def load(files=None, **_):
    """The questions of all `files` (paths or globs); picture paths count from their own file's folder."""
    if not files:
        raise ConfigError("task omniloom_pictures has no questions: set task_args.omniloom_pictures.files=[…]")
    rows = []
    for pattern in [files] if isinstance(files, str) else files:
        paths = sorted(glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"task omniloom_pictures: no file matches {pattern}")
        for path in paths:
            try:
                lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"task omniloom_pictures cannot read {path}: {error}") from error
            rows += [question(path, number, line) for number, line in enumerate(lines, 1)]
    return {"test": datasets.Dataset.from_list(rows)}


def question(path, number, line):
    """One line, checked; raises DataError naming file, line and key."""
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a question is a mapping of {', '.join(KEYS)}")
    for key in KEYS:
        if key not in row:
            raise DataError(f"{where}: no {key}; {did_you_mean(key, row)}")
    if not isinstance(row["answer"], int) or not 0 <= row["answer"] < len(row["choices"]):
        raise DataError(f"{where}: answer={row['answer']} is not an index of its {len(row['choices'])} choices")
    image = Path(path).absolute().parent / row["image"]
    if not image.is_file():
        raise DataError(f"{where}: no picture at {image}")
    return {**{key: row[key] for key in KEYS}, "image": str(image)}


def pictures(doc):
    """The pictures of one question, as paths."""
    return [doc["image"]]
