"""A finished corpus folder, opened without reading it: an index, tables and shards that are mapped when asked for."""

import hashlib
import shutil
from collections.abc import Iterator
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache
from pydantic import TypeAdapter, ValidationError

from omniloom.data.config import SPLITS, Split
from omniloom.data.index import LENGTH, MOST_SOURCES, PREFERENCE, Index, Reject, SplitRecord, file_sha256
from omniloom.data.shards import Shard
from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.sequence import Document
from omniloom.modality.text import TextTokenizer, load_tokenizer

OPEN_SHARDS = 256
INDEX, TOKENIZER, REJECTS, TARGETS = "index.json", "tokenizer.json", "rejects.jsonl", "target_counts.json"
SHARD_TABLE = pa.schema(
    [
        ("file", pa.string()),
        ("sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("bytes", pa.int64()),
        ("first_document", pa.int64()),  # within its split
        ("documents", pa.int64()),
    ]
)


def shards_file(split: Split) -> str:
    """The table of a split's shards, in the order of their documents."""
    return f"{split}.shards.arrow"


def lengths_file(split: Split) -> str:
    """The table of a split's documents."""
    return f"{split}.lengths"


class Corpus:
    """A finished corpus folder; raises DataError where its index is missing or not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            unfinished = " (it is half built: repeat the same tokenize command)" if folder.is_dir() else ""
            raise DataError(f"no corpus at {folder}{unfinished}: set corpus=<folder that `omniloom tokenize` wrote>")
        try:
            content = path.read_bytes()
            self.index = TypeAdapter(Index).validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{path} is no corpus index of this version: {where}: {first['msg']}; tokenize again"
            ) from error
        for name, table in self.index.files.items():
            _check_size(folder / name, table.bytes)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        return Corpus, (self.folder,)  # another process maps the files anew

    def verify(self) -> None:
        """Raise DataError unless the vocabulary is the shards' own and every shard has its size."""
        if file_sha256(self.folder / TOKENIZER) != self.index.files[TOKENIZER].sha256:
            raise DataError(f"{self.folder / TOKENIZER} is not the one the shards were made with: tokenize again")
        for split in SPLITS:
            for shard in self.shard_table(split).to_pylist():
                _check_size(self.folder / "shards" / shard["file"], shard["bytes"])

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The corpus's own vocabulary."""
        return load_tokenizer(self.folder / TOKENIZER)

    def shard_table(self, split: Split) -> pa.Table:
        """The split's shards, SHARD_TABLE, read by memory map."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / shards_file(split)))).read_all()

    def lengths(self, split: Split) -> np.ndarray:
        """The split's documents, LENGTH, read by memory map."""
        path = self.folder / lengths_file(split)
        count = path.stat().st_size // LENGTH.itemsize
        return np.memmap(path, LENGTH, "r", shape=(count,)) if count else np.zeros(0, LENGTH)

    def rejects(self) -> Iterator[Reject]:
        """What was skipped while the corpus was made, by name and reason."""
        adapter = TypeAdapter(Reject)
        with (self.folder / REJECTS).open("rb") as lines:
            for line in lines:
                yield adapter.validate_json(line)

    def write_reading_rules(self, folder: Path) -> None:
        """Put beside a model what turns files into its tokens: tokenizer.json and modality.json.

        And target_counts.json: a unigram model, what its text scores are held against.
        """
        for name in (TOKENIZER, TARGETS):
            shutil.copyfile(self.folder / name, folder / name)
        (folder / "modality.json").write_bytes(TypeAdapter(ModalityConfig).dump_json(self.index.modality, indent=1))


class CorpusSplit:
    """The documents of one split of a corpus, numbered in shard order; a shard is opened when first asked for."""

    def __init__(self, corpus: Corpus, split: Split) -> None:
        self._folder, self._widths = corpus.folder / "shards", corpus.index.modality.widths
        self.lengths = corpus.lengths(split)
        self._table = corpus.shard_table(split)
        self._first = self._table.column("first_document").to_numpy()
        self._open: LRUCache[int, Shard] = LRUCache(OPEN_SHARDS)

    def document(self, index: int) -> Document:
        """The document numbered `index`."""
        shard, place = self._find(index)
        return shard.document(place)

    def name(self, index: int) -> str:
        """Where that document came from."""
        shard, place = self._find(index)
        return shard.name(place)

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        if (shard := self._open.get(number)) is None:
            path = self._folder / self._table.column("file")[number].as_py()
            _check_size(path, self._table.column("bytes")[number].as_py())
            shard = self._open[number] = Shard(path, self._widths)
        return shard, index - int(self._first[number])


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes, the index says {expected:,}: tokenize again")


class Documents:
    """The documents of one split of several corpora as one range of numbers, the sources one after the other.

    Raises DataError where two corpora share a source's name, or their tokenizers or sizes of media differ.
    """

    def __init__(self, corpora: list[Corpus], split: Split) -> None:
        self.corpora, self.split = corpora, split
        for one, other in combinations(corpora, 2):
            _refuse_unlike(one, other)
        self._splits = [CorpusSplit(corpus, split) for corpus in corpora]
        self.names: list[str] = []
        self.lengths_S: list[np.ndarray] = []
        corpus_of: list[int] = []
        self._place_S: list[int] = []  # of the source's first document within its corpus
        records: list[SplitRecord] = []
        for number, corpus in enumerate(corpora):
            place = 0
            for source in corpus.index.sources:
                held = source.split(split)
                records.append(held)
                self.names.append(source.name)
                self.lengths_S.append(self._splits[number].lengths[place : place + held.documents])
                corpus_of.append(number)
                self._place_S.append(place)
                place += held.documents
        if len(records) > MOST_SOURCES:
            raise DataError(f"the corpora have {len(records)} sources in all; {MOST_SOURCES} are possible")
        self.corpus_S = np.array(corpus_of, int)
        self.first_S = np.cumsum([0, *(record.documents for record in records)])
        self.is_streamed_S = np.array([s.format != PREFERENCE for corpus in corpora for s in corpus.index.sources])
        self.tokens_S = np.array([record.tokens for record in records])

    def __reduce__(self) -> tuple[type["Documents"], tuple[Any, ...]]:
        return Documents, (self.corpora, self.split)

    def __len__(self) -> int:
        return int(self.first_S[-1])

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Those documents as packing sees them, LENGTH."""
        lengths = np.zeros(len(documents), LENGTH)
        source = self.sources(documents)
        for s in np.unique(source):
            mine = source == s
            lengths[mine] = self.lengths_S[s][documents[mine] - self.first_S[s]]
        return lengths

    @property
    def tokenizer(self) -> TextTokenizer:
        """The vocabulary of all of them."""
        return self.corpora[0].tokenizer

    @property
    def modality(self) -> ModalityConfig:
        """The sizes of media of all of them."""
        return self.corpora[0].index.modality

    @property
    def streamed(self) -> int:
        """How many of them may come in a stream: preference pairs do not."""
        return int(np.diff(self.first_S)[self.is_streamed_S].sum())

    def source(self, document: int) -> int:
        """The number of its source."""
        return int(np.searchsorted(self.first_S, document, side="right")) - 1

    def sources(self, documents: np.ndarray) -> np.ndarray:
        """The numbers of their sources."""
        return np.searchsorted(self.first_S, documents, side="right") - 1

    def document(self, document: int) -> Document:
        """The document of that number, its arrays lying in the mapped shard."""
        split, place = self._find(document)
        return split.document(place)

    def name(self, document: int) -> str:
        """Where that document came from."""
        split, place = self._find(document)
        return split.name(place)

    def _find(self, document: int) -> tuple[CorpusSplit, int]:
        source = self.source(document)
        place = self._place_S[source] + document - int(self.first_S[source])
        return self._splits[self.corpus_S[source]], place


def _refuse_unlike(one: Corpus, other: Corpus) -> None:
    shared = {source.name for source in one.index.sources} & {source.name for source in other.index.sources}
    if shared:
        raise DataError(
            f"{one.folder} and {other.folder} both have a source {sorted(shared)[0]}: losses and weights go by its "
            "name; rename it in one manifest and tokenize again"
        )
    ours, theirs = (corpus.index.files[TOKENIZER].sha256 for corpus in (one, other))
    if ours != theirs:
        raise DataError(
            f"the tokenizers of {one.folder} ({ours[:12]}) and {other.folder} ({theirs[:12]}) differ: tokenize the "
            f"second with tokenizer.path={one.folder / TOKENIZER}"
        )
    if one.index.modality != other.index.modality:
        raise DataError(f"{one.folder} and {other.folder} cut media differently: give both the same modality.…")
