"""The standard library's own source as text: enough that a small model can train long and read nothing twice."""

import random
import sysconfig
import tokenize
from pathlib import Path
from typing import Any

from omniloom.data.samples.files import document, write_jsonl
from omniloom.errors import ConfigError

SPLIT_SEED = 0  # the held-out modules never depend on the run's seed: scores of different seeds stay comparable
HELDOUT_SHARE = 0.1
PASSAGE_CHARACTERS = 1_000
# Installed beside it, tests, and tables rather than text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}


def write_library(folder: Path) -> dict[str, Any]:
    """Write passages of the modules and return the manifest's sources; whole modules are held out.

    Short and shuffled: any stretch of them, for training or of those held out, is like any other.
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path for path in library.rglob("*.py") if not LEFT_OUT & {*path.relative_to(library).parts})
    if not modules:
        raise ConfigError(f"samples=library reads the standard library's modules, and {library} holds no *.py")
    generator = random.Random(SPLIT_SEED)
    heldout = set(generator.sample(modules, round(HELDOUT_SHARE * len(modules))))
    for split in ("train", "heldout"):
        passages = [
            passage
            for module in modules
            if (module in heldout) == (split == "heldout")
            for passage in _passages(_read(module))
        ]
        generator.shuffle(passages)
        write_jsonl(folder / f"{split}.jsonl", (document({"text": passage}) for passage in passages))
    return {"modules": {"format": "interleaved", "train": ["train.jsonl"], "heldout": ["heldout.jsonl"]}}


def _read(module: Path) -> str:
    with tokenize.open(module) as stream:  # in the encoding that it declares
        return stream.read()


def _passages(text: str) -> list[str]:
    """Paragraphs, as many together as reach PASSAGE_CHARACTERS; what is left at the end goes with the last."""
    passages = [""]
    for paragraph in text.split("\n\n"):
        if len(passages[-1]) >= PASSAGE_CHARACTERS:
            passages.append("")
        passages[-1] += paragraph + "\n\n"
    if len(passages) > 1 and len(passages[-1]) < PASSAGE_CHARACTERS:
        rest = passages.pop()
        passages[-1] += rest
    return [passage for passage in passages if passage.strip()]
