"""A corpus's vocabulary: anybody's that is named, or one trained on its text by a worker; the driver shows a bar."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from omniloom.data.corpus import TOKENIZER
from omniloom.data.index import file_sha256
from omniloom.data.readers import read_documents
from omniloom.data.source import Unit
from omniloom.errors import DataError
from omniloom.modality.config import TokenizerConfig
from omniloom.modality.text import adopt_tokenizer, train_tokenizer

TRAINING_BYTES = 256 << 20  # a vocabulary learns nothing more from more text
LEAST_SHARE_BYTES = 1 << 20  # of it, from one unit
COUNTED_BYTES = 1 << 20
LOOK_SECONDS = 0.5
TOKENIZER_MADE = "tokenizer_made.json"  # beside tokenizer.json


@dataclass
class TokenizerMade:
    """What made a corpus's tokenizer.json, and its SHA-256: of one that was adopted, of what was adopted."""

    config: TokenizerConfig
    sha256: str


class _Counter:
    """Bytes read by a worker, for the driver to look at."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count

    def value(self) -> int:
        return self._bytes


def build_tokenizer(units: list[Unit], config: TokenizerConfig, corpus: Path) -> None:
    """Have a worker write the corpus's tokenizer.json, with a bar of the text that it has read."""
    counter = ray.remote(_Counter).options(num_cpus=0).remote()

    def make() -> None:
        make_tokenizer(units, config, corpus, counter.add.remote)

    task = ray.remote(make).options(num_cpus=1).remote()
    with tqdm(desc="train tokenizer", unit="B", unit_scale=True, disable=config.path is not None) as bar:
        while not ray.wait([task], timeout=LOOK_SECONDS)[0]:
            bar.update(ray.get(counter.value.remote()) - bar.n)
    ray.get(task)


def make_tokenizer(units: list[Unit], config: TokenizerConfig, corpus: Path, count: Callable[[int], object]) -> None:
    """Adopt the named tokenizer, or train one on the units' text, `count` told of it; a finished one is kept.

    The record of what made it is written last: without it, or where it asks for another, it is made anew.
    """
    path = corpus / TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing else runs yet
    if config.path is not None:
        adopt_tokenizer(config.path).save(path)
    elif path.is_file() and read_made(corpus) == TokenizerMade(config, file_sha256(path)):
        return
    else:
        train_tokenizer(_counted(training_texts(units), count), config.vocab_size).save(path)
    made = TokenizerMade(config, file_sha256(path))
    (corpus / TOKENIZER_MADE).write_bytes(TypeAdapter(TokenizerMade).dump_json(made, indent=1))


def read_made(corpus: Path) -> TokenizerMade | None:
    """What made the corpus's tokenizer.json, or None where that never got finished."""
    try:
        return TypeAdapter(TokenizerMade).validate_json((corpus / TOKENIZER_MADE).read_bytes())
    except (OSError, ValidationError):
        return None


def refuse_other_tokenizer(config: TokenizerConfig, corpus: Path) -> None:
    """Raise DataError where a finished corpus's tokenizer is not the one that `config` asks for.

    One that is named may have been moved since: it is the same where it reads the same.
    """
    made, sha256, asked = read_made(corpus), file_sha256(corpus / TOKENIZER), None
    if config.path is not None:
        with TemporaryDirectory() as folder:
            adopt_tokenizer(config.path).save(Path(folder) / TOKENIZER)
            asked = file_sha256(Path(folder) / TOKENIZER)
    elif made is not None and made.config == config:
        asked = made.sha256
    if made is None or not made.sha256 == sha256 == asked:
        held = "another tokenizer" if made is None else _said(made.config, sha256)
        raise DataError(
            f"{corpus} holds a corpus of {held}, asked is {_said(config, asked)}: name another corpus=<folder>, or "
            "rebuild this one with force=true"
        )


def _said(config: TokenizerConfig, sha256: str | None) -> str:
    if config.path is None:
        return f"tokenizer.vocab_size={config.vocab_size}"
    return f"tokenizer.path={config.path}" + (f" ({sha256[:12]})" if sha256 else "")


def training_texts(units: list[Unit]) -> Iterator[str]:
    """Texts to train on: as much of every unit, in a fixed shuffled order, so that no source is left out of a cut."""
    share = max(TRAINING_BYTES // max(len(units), 1), LEAST_SHARE_BYTES)
    left = TRAINING_BYTES
    for unit in random.Random(0).sample(units, len(units)):
        of_unit = share
        for document in read_documents(unit):
            for segment in document.segments:
                if isinstance(segment.content, str):
                    yield segment.content
                    of_unit -= len(segment.content.encode())
            if of_unit <= 0:
                break
        left -= share - of_unit
        if left <= 0:
            return


def _counted(texts: Iterator[str], count: Callable[[int], object]) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= COUNTED_BYTES:
            count(read)
            read = 0
