"""Questions about media, from jsonl files of {"segments": [{"image": …}, {"text": …}], "choices": […], "answer": 0}."""

import json
from pathlib import Path

import datasets

from omniloom.errors import DataError, did_you_mean
from omniloom.evaluation.files import read_files
from omniloom.evaluation.media import PLACEHOLDERS

KEYS = ("segments", "choices", "answer")
SEEN, HEARD = (
    tuple(kind for kind, held_by in PLACEHOLDERS.values() if held_by == argument) for argument in ("visual", "audio")
)
KINDS = ("text", *SEEN, *HEARD)


def load(task, files=None, **_):
    """The questions of all `files` (paths or globs); media paths count from their own file's folder."""
    rows = [
        question(path, number, line)
        for path, text in read_files(task, "questions", files)
        for number, line in enumerate(text.rstrip("\n").split("\n"), 1)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def question(path, number, line):
    """One line as prompt with placeholders, media, choices and answer; raises DataError naming file, line and key."""
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
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: choices must be a list of strings")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer={answer} is not an index of its {len(choices)} choices")
    if not isinstance(row["segments"], list) or not row["segments"]:
        raise DataError(f"{where}: segments must be a list of one or more")
    segments = [segment(where, entry, Path(path).absolute().parent) for entry in row["segments"]]
    return {
        "prompt": "".join(content if kind == "text" else f"<{kind}>" for kind, content in segments),
        "seen": [content for kind, content in segments if kind in SEEN],
        "heard": [content for kind, content in segments if kind in HEARD],
        "choices": choices,
        "answer": answer,
    }


def segment(where, entry, folder):
    """(kind, text or path) of one segment."""
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), str):
        raise DataError(f"{where}: a segment is one of {', '.join(KINDS)} and a string")
    kind, content = next(iter(entry.items()))
    if kind not in KINDS:
        raise DataError(f"{where}: unknown segment {kind}; {did_you_mean(kind, KINDS)}")
    if kind == "text":
        for placeholder in PLACEHOLDERS:
            if placeholder in content:
                raise DataError(f"{where}: a text holds {placeholder}, which stands for a medium in prompts")
        return kind, content
    if not (folder / content).is_file():
        raise DataError(f"{where}: no {kind} at {folder / content}")
    return kind, str(folder / content)


def seen(doc):
    """Paths of the pictures and videos of one question, in order."""
    return doc["seen"]


def heard(doc):
    """Paths of the clips of one question, in order."""
    return doc["heard"]
