"""A corpus's vocabulary: anybody's that is named, or one trained on its text by a worker; the driver shows a bar."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from tqdm import tqdm

from omniloom.data.readers import read_documents
from omniloom.data.source import Unit
from omniloom.errors import DataError
from omniloom.modality.config import TokenizerConfig
from omniloom.modality.text import adopt_tokenizer, load_tokenizer, train_tokenizer

TRAINING_BYTES = 256 << 20  # a vocabulary learns nothing more from more text
LEAST_SHARE_BYTES = 1 << 20  # of it, from one unit
COUNTED_BYTES = 1 << 20
LOOK_SECONDS = 0.5


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
    """Adopt the named tokenizer, or train one on the units' text, `count` told of it; a finished one is kept."""
    path = corpus / "tokenizer.json"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing else runs yet
    if config.path is not None:
        adopt_tokenizer(config.path).save(path)
    elif not _is_tokenizer(path):
        train_tokenizer(_counted(training_texts(units), count), config.vocab_size).save(path)


def _is_tokenizer(path: Path) -> bool:
    try:
        load_tokenizer(path)
    except DataError:
        return False
    return True


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
