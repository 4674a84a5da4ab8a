"""Questions about pictures, from jsonl files of {image, question, choices, answer}."""

import json
from pathlib import Path

import datasets

from omniloom.errors import DataError, did_you_mean
from omniloom.evaluation.files import read_files

KEYS = ("image", "question", "choices", "answer")


def load(files=None, **_):
    """The questions of all `files` (paths or globs); picture paths count from their own file's folder."""
    rows = [
        question(path, number, line)
        for path, text in read_files("omniloom_pictures", "questions", files)
        for number, line in enumerate(text.rstrip("\n").split("\n"), 1)
    ]
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
