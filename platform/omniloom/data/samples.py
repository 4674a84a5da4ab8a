"""Sample corpora made on this machine from installed packages alone, as ordinary files: nothing is downloaded.

`demo` needs the `demo` extra (scikit-learn): the standard library's help topics and handwritten digits. `smoke` needs
nothing: generated words and pictures of one colour, for tests.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from omniloom.errors import ConfigError, did_you_mean

SPLIT_SEED = 0  # the held-out files never depend on the run's seed: scores of different seeds stay comparable
DIGIT_QUESTIONS = ("Which digit is this?", "What number is shown?", "Read the digit.")
EVAL_QUESTION = DIGIT_QUESTIONS[0]


def write_samples(kind: str, folder: Path) -> Path:
    """Write the sample files of `kind` under `folder` and return their manifest; finished ones are kept."""
    if kind not in KINDS:
        raise ConfigError(f"unknown samples={kind}; {did_you_mean(kind, KINDS)}")
    manifest = folder / "manifest.yaml"
    if not manifest.is_file():
        sources = KINDS[kind](folder)
        manifest.write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))  # written last: the commit
    return manifest


def _demo(folder: Path) -> dict[str, Any]:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError("samples=demo needs scikit-learn: pip install 'omniloom[demo]'") from error
    _write_topics(folder / "topics")
    _write_digits(folder / "digits")
    return {
        "topics": {
            "format": "text",
            "train": ["topics/train/*.txt"],
            "heldout": ["topics/heldout/*.txt"],
            "weight": 0.7,
        },
        "digits": {
            "format": "interleaved",
            "train": ["digits/train-*.jsonl"],
            "heldout": ["digits/heldout.jsonl"],
            "weight": 0.3,
            "loss_weight": 4.0,
        },
    }


def _write_topics(folder: Path) -> None:
    """The standard library's help topics, one file each; topics that share a passage lie on one side of the split."""
    from pydoc_data.topics import topics

    from sklearn.feature_extraction.text import CountVectorizer

    names = sorted(topics)
    shingles = CountVectorizer(ngram_range=(8, 8), binary=True, token_pattern=r"\w+")
    # Shorter than a shingle: padded with its own name, which no other topic holds.
    seen = shingles.fit_transform([f"{topics[name]} {' '.join([name] * 8)}" for name in names])
    shared = (seen @ seen.T).toarray()
    smaller = np.minimum.outer(shared.diagonal(), shared.diagonal())
    heldout = _heldout(shared > 0.1 * smaller, share=0.15)
    for name, is_heldout in zip(names, heldout, strict=True):
        path = folder / ("heldout" if is_heldout else "train") / f"{name.replace('/', '_')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(topics[name], encoding="utf-8")


def _write_digits(folder: Path) -> None:
    """scikit-learn's 8 × 8 handwritten digits as png, with questions; near-equal pictures lie on one side."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import radius_neighbors_graph

    images, labels = load_digits(return_X_y=True)
    heldout = _heldout(radius_neighbors_graph(images, radius=8.0), share=0.2)
    (folder / "png").mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(images):
        paths.append(f"png/{number:04d}.png")
        Image.fromarray((image.reshape(8, 8) * 255 / 16).round().astype(np.uint8)).save(folder / paths[-1])
    train, kept = np.flatnonzero(~heldout), np.flatnonzero(heldout)
    asked = random.Random(SPLIT_SEED)
    for part, members in enumerate(np.array_split(train, 4)):
        lines = [picture_document(paths[i], asked.choice(DIGIT_QUESTIONS), str(labels[i])) for i in members]
        _write_jsonl(folder / f"train-{part}.jsonl", lines)
    _write_jsonl(folder / "heldout.jsonl", (picture_document(paths[i], EVAL_QUESTION, str(labels[i])) for i in kept))
    choices = [str(digit) for digit in range(10)]
    _write_jsonl(
        folder / "questions.jsonl",
        ({"image": paths[i], "question": EVAL_QUESTION, "choices": choices, "answer": int(labels[i])} for i in kept),
    )


def _heldout(is_near: Any, share: float) -> np.ndarray:
    """Choose `share` of the items, whole groups of near-duplicates at a time; bool (items,)."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.model_selection import GroupShuffleSplit

    groups = connected_components(is_near, directed=False)[1]
    split = GroupShuffleSplit(n_splits=1, test_size=share, random_state=SPLIT_SEED)
    _, chosen = next(split.split(groups, groups=groups))
    return np.isin(np.arange(len(groups)), chosen)


def _smoke(folder: Path) -> dict[str, Any]:
    generator = random.Random(SPLIT_SEED)
    words = ["".join(generator.choices("aeiouklmnprst", k=generator.randint(2, 7))) for _ in range(60)]
    for split, files in (("train", 8), ("heldout", 2)):
        for number in range(files):
            path = folder / "words" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(generator.choices(words, k=400)) + ".\n", encoding="utf-8")
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
    (folder / "colours").mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).save(folder / "colours" / f"{name}.png")
    question = "Which colour?"
    for split, count in (("train", 60), ("heldout", 12)):
        chosen = [generator.choice(sorted(colours)) for _ in range(count)]
        lines = (picture_document(f"{name}.png", question, name) for name in chosen)
        _write_jsonl(folder / "colours" / f"{split}.jsonl", lines)
    names = sorted(colours)
    _write_jsonl(
        folder / "colours" / "questions.jsonl",
        ({"image": f"{n}.png", "question": question, "choices": names, "answer": names.index(n)} for n in names * 2),
    )
    return {
        "words": {"format": "text", "train": ["words/train/*.txt"], "heldout": ["words/heldout/*.txt"]},
        "colours": {"format": "interleaved", "train": ["colours/train.jsonl"], "heldout": ["colours/heldout.jsonl"]},
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {"demo": _demo, "smoke": _smoke}


def picture_document(image: str, question: str, answer: str) -> dict[str, Any]:
    """An interleaved document: a picture, a question that is read, an answer that is learned."""
    return {"segments": [{"image": image}, {"text": question, "loss": False}, {"text": f" {answer}"}]}


def _write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
