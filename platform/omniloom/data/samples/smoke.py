"""Generated words, pictures of one colour, tones, and videos that fade: four modalities in a second, for tests."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omniloom.data.samples.files import answered, asked, document, question, write_jsonl, write_mp4, write_wav

SEED = 0
SAMPLE_RATE = 16_000
QUESTIONS = {"colours": "Which colour?", "tones": "Which tone?", "fades": "Which way?"}


def write_smoke(folder: Path) -> dict[str, Any]:
    """Write the files and return the manifest's sources."""
    generator = random.Random(SEED)
    words = ["".join(generator.choices("aeiouklmnprst", k=generator.randint(2, 7))) for _ in range(60)]
    for split, files in (("train", 8), ("heldout", 2)):
        for number in range(files):
            path = folder / "words" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(generator.choices(words, k=400)) + ".\n", encoding="utf-8")
    sources: dict[str, Any] = {
        "words": {"format": "text", "train": ["words/train/*.txt"], "heldout": ["words/heldout/*.txt"]}
    }
    for source, media in (("colours", _colours(folder)), ("tones", _tones(folder)), ("fades", _fades(folder))):
        names, text = sorted(media), QUESTIONS[source]
        for split, count in (("train", 60), ("heldout", 12)):
            chosen = [generator.choice(names) for _ in range(count)]
            lines = (document(media[name], asked(text), answered(name)) for name in chosen)
            write_jsonl(folder / source / f"{split}.jsonl", lines)
        lines = (question([media[name]], text, names, name) for name in names * 2)
        write_jsonl(folder / source / "questions.jsonl", lines)
        sources[source] = {
            "format": "interleaved",
            "train": [f"{source}/train.jsonl"],
            "heldout": [f"{source}/heldout.jsonl"],
        }
    return sources


def _colours(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "colours").mkdir(parents=True, exist_ok=True)
    for name, colour in (("red", (220, 30, 30)), ("green", (30, 200, 40)), ("blue", (40, 60, 220))):
        Image.new("RGB", (16, 16), colour).save(folder / "colours" / f"{name}.png")
    return {name: {"image": f"{name}.png"} for name in ("red", "green", "blue")}


def _tones(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "tones").mkdir(parents=True, exist_ok=True)
    seconds = np.arange(SAMPLE_RATE // 5) / SAMPLE_RATE
    for name, hertz in (("low", 200), ("high", 2_000)):
        write_wav(folder / "tones" / f"{name}.wav", 8_000 * np.sin(2 * np.pi * hertz * seconds), SAMPLE_RATE)
    return {name: {"audio": f"{name}.wav"} for name in ("low", "high")}


def _fades(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "fades").mkdir(parents=True, exist_ok=True)
    rising = np.linspace(0, 255, 8).astype(np.uint8)
    for name, levels in (("lighter", rising), ("darker", rising[::-1])):
        write_mp4(folder / "fades" / f"{name}.mp4", np.broadcast_to(levels[:, None, None, None], (8, 16, 16, 3)), 4)
    return {name: {"video": f"{name}.mp4"} for name in ("lighter", "darker")}
