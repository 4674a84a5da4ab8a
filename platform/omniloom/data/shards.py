"""Documents of the unified sequence on disk: Arrow files, read by memory map; an index written last.

A corpus folder: `tokenizer.json`, `shards/<unit>.arrow` with `<unit>.json` beside it (written last, the shard's
commit), `index.json` (written last of all, the corpus's commit).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache, cached
from pydantic import TypeAdapter, ValidationError

from omniloom.data.config import Split
from omniloom.data.readers import read_documents, unit_state
from omniloom.data.source import RawDocument, RemoteMedia, Unit
from omniloom.data.storage import fetch
from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig, Widths
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import MODALITIES, TEXT, Document, Segment, weave
from omniloom.modality.text import TextTokenizer, load_tokenizer

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("modality", pa.binary()),
        ("position", pa.large_binary()),
        ("loss_mask", pa.binary()),
        ("image", pa.large_binary()),
        ("audio", pa.large_binary()),
        ("audio_frames", pa.binary()),
        ("video", pa.large_binary()),
    ]
)
BLOBS = SCHEMA.names[2:]  # arrays as their bytes
DOCUMENTS_PER_BATCH = 256
MEDIA_KEPT_BYTES = 64 << 20


@dataclass
class Reject:
    """A document that was skipped, and why."""

    name: str
    reason: str


@dataclass
class ShardRecord:
    """What one shard holds; `fingerprint` covers its input files, the tokenizer and the modality's sizes."""

    file: str
    source: str
    split: Split
    fingerprint: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    media_tokens: dict[str, int]  # by modality
    rejects: list[Reject]


@dataclass
class SourceRecord:
    """A source as the manifest weighed it."""

    name: str
    weight: float
    loss_weight: float


@dataclass
class Index:
    """The corpus's table of contents."""

    tokenizer_sha256: str
    vocab_size: int
    modality: ModalityConfig
    sources: list[SourceRecord]
    shards: list[ShardRecord]
    # How often each id is a target of the training text: what a unigram model knows.
    target_counts: list[int]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unit_fingerprint(unit: Unit, tokenizer_sha256: str, modality: ModalityConfig) -> str:
    """A hash of everything a shard depends on, media included; files count by path, size and time of change."""
    files = unit_state(unit)
    return hashlib.sha256(json.dumps([asdict(unit), files, tokenizer_sha256, asdict(modality)]).encode()).hexdigest()


def read_record(path: Path) -> ShardRecord | None:
    """The record of a finished shard, or None where it never got that far or its file is cut short."""
    try:
        record = TypeAdapter(ShardRecord).validate_json(path.read_bytes())
        return record if (path.parent / record.file).stat().st_size == record.bytes else None
    except (OSError, ValidationError):
        return None


def write_shard(unit: Unit, corpus: Path, modality: ModalityConfig) -> ShardRecord:
    """Read a unit's files, media included, and write its shard; a finished shard of the same input is kept."""
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    fingerprint = unit_fingerprint(unit, file_sha256(corpus / "tokenizer.json"), modality)
    record_path = corpus / "shards" / f"{unit.name}.json"
    done = read_record(record_path)
    if done is not None and done.fingerprint == fingerprint:
        return done
    record_path.unlink(missing_ok=True)
    path = record_path.with_suffix(".arrow")
    rejects: list[Reject] = []
    documents = 0
    tokens = np.zeros(len(MODALITIES), np.int64)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in _batches(_woven(unit, tokenizer, modality, rejects)):
            documents += len(batch)
            tokens += sum(np.bincount(document.modality, minlength=len(MODALITIES)) for _, document in batch)
            writer.write_batch(_to_arrow(batch))
    record = ShardRecord(
        file=path.name,
        source=unit.source,
        split=unit.split,
        fingerprint=fingerprint,
        sha256=file_sha256(path),
        bytes=path.stat().st_size,
        documents=documents,
        tokens=int(tokens.sum()),
        media_tokens=dict(zip(MODALITIES[1:], tokens[1:].tolist(), strict=True)),
        rejects=rejects,
    )
    record_path.write_bytes(TypeAdapter(ShardRecord).dump_json(record, indent=1))
    return record


def _woven(
    unit: Unit, tokenizer: TextTokenizer, modality: ModalityConfig, rejects: list[Reject]
) -> Iterator[tuple[str, Document]]:
    # Documents may share their media: what was read lately is kept.
    kept: LRUCache[Any, list[Segment]] = LRUCache(
        MEDIA_KEPT_BYTES, getsizeof=lambda held: sum(s.content.nbytes for s in held)
    )
    read = cached(kept)(partial(read_media, config=modality))
    for raw in read_documents(unit):
        try:
            yield raw.name, weave_document(raw, tokenizer, modality, read)
        except DataError as error:
            rejects.append(Reject(raw.name, str(error)))


def weave_document(
    raw: RawDocument, tokenizer: TextTokenizer, modality: ModalityConfig, read: Callable[[str, Media], list[Segment]]
) -> Document:
    """Read a raw document's media by `read` and weave it; raises DataError saying why it cannot be used."""
    if raw.problem is not None:
        raise DataError(raw.problem)
    segments: list[Segment] = []
    for part in raw.segments:
        if isinstance(part.content, str):
            segments.append(tokenizer.segment(part.content, part.is_target))
            continue
        medium = part.content
        if isinstance(medium, RemoteMedia):
            limit = getattr(modality, part.kind).limit_bytes
            medium = fetch(medium, limit, f"modality.{part.kind}.limit_bytes")
        segments += read(part.kind, medium)
    return weave(segments, tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, modality.widths)


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    for document in documents:
        batch.append(document)
        if len(batch) == DOCUMENTS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_arrow(batch: list[tuple[str, Document]]) -> pa.RecordBatch:
    def blobs(field: str) -> list[bytes]:
        return [getattr(document, field).tobytes() for _, document in batch]

    columns = [
        pa.array([name for name, _ in batch], pa.string()),
        pa.array([document.input_ids for _, document in batch], SCHEMA.field("input_ids").type),
        *(pa.array(blobs(field), SCHEMA.field(field).type) for field in BLOBS),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


class Shard:
    """One Arrow file, opened by memory map: a document is read without touching the others."""

    def __init__(self, path: Path, widths: Widths) -> None:
        self._widths = widths
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def lengths(self) -> np.ndarray:
        """Tokens and bytes of media of each document, int64 (documents, 2); only offsets are read."""
        columns = []
        for batch in self._batches:
            tokens = np.diff(batch.column("input_ids").offsets.to_numpy())
            media = sum(_sizes(batch.column(field)) for field in ("image", "audio", "video"))
            columns.append(np.stack([tokens, media], axis=1))
        return np.concatenate(columns) if columns else np.zeros((0, 2), np.int64)

    def document(self, index: int) -> Document:
        """The document at `index` of this shard."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, row = self._batches[number], index - int(self._starts[number])

        def blob(field: str, dtype: type) -> np.ndarray:
            return np.frombuffer(batch.column(field)[row].as_buffer(), dtype)

        return Document(
            input_ids=batch.column("input_ids")[row].values.to_numpy(),
            modality=blob("modality", np.uint8),
            position=blob("position", np.int32).reshape(-1, 3),
            loss_mask=blob("loss_mask", np.uint8),
            image=blob("image", np.uint8).reshape(-1, self._widths.image),
            audio=blob("audio", np.float16).reshape(-1, self._widths.audio),
            audio_frames=blob("audio_frames", np.int32),
            video=blob("video", np.uint8).reshape(-1, self._widths.video),
        )


def _sizes(column: Any) -> np.ndarray:
    """Bytes of each value of a large_binary column."""
    return np.diff(np.frombuffer(column.buffers()[1], np.int64, len(column) + 1, column.offset * 8))


class Corpus:
    """A finished corpus folder; raises DataError where the index is missing or a shard is not what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "index.json"
        if not path.is_file():
            unfinished = " (it is half built: repeat the same tokenize command)" if folder.is_dir() else ""
            raise DataError(f"no corpus at {folder}{unfinished}: set corpus=<folder that `omniloom tokenize` wrote>")
        try:
            content = path.read_bytes()
            self.index = TypeAdapter(Index).validate_json(content)
        except ValidationError as error:
            raise DataError(f"{path} is no corpus index: {error.errors()[0]['msg']}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocabulary = folder / "tokenizer.json"
        if not vocabulary.is_file() or file_sha256(vocabulary) != self.index.tokenizer_sha256:
            raise DataError(f"{vocabulary} is missing or not the one the shards were made with: tokenize again")
        for shard in self.index.shards:
            file = folder / "shards" / shard.file
            size = file.stat().st_size if file.is_file() else 0
            if size != shard.bytes:
                raise DataError(f"shard {file} has {size:,} bytes, the index says {shard.bytes:,}: tokenize again")

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The corpus's own vocabulary."""
        return load_tokenizer(self.folder / "tokenizer.json")

    def split(self, split: Split) -> "CorpusSplit":
        """The documents of one split."""
        return CorpusSplit(self, split)

    def write_reading_rules(self, folder: Path) -> None:
        """Put beside a model what turns files into its tokens: tokenizer.json and modality.json.

        And target_counts.json: a unigram model, what its text scores are held against.
        """
        shutil.copyfile(self.folder / "tokenizer.json", folder / "tokenizer.json")
        (folder / "modality.json").write_bytes(TypeAdapter(ModalityConfig).dump_json(self.index.modality, indent=1))
        (folder / "target_counts.json").write_text(json.dumps(self.index.target_counts))


class CorpusSplit:
    """The documents of one split of a corpus, numbered in shard order."""

    def __init__(self, corpus: Corpus, split: Split) -> None:
        records = [record for record in corpus.index.shards if record.split == split]
        widths = corpus.index.modality.widths
        names = [source.name for source in corpus.index.sources]
        self.tokenizer, self.widths = corpus.tokenizer, widths
        self._shards = [Shard(corpus.folder / "shards" / record.file, widths) for record in records]
        lengths = [shard.lengths() for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, lengths)])
        joined = np.concatenate(lengths) if lengths else np.zeros((0, 2), np.int64)
        self.tokens, self.has_media = joined[:, 0], joined[:, 1] > 0
        self.source = np.repeat([names.index(record.source) for record in records], [len(x) for x in lengths])

    def __len__(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> Document:
        """The document numbered `index`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].document(index - int(self._starts[shard]))


def count_targets(corpus: Path, records: list[ShardRecord], widths: Widths, vocab_size: int) -> list[int]:
    """How often each id is a target in the training split's text."""
    counts = np.zeros(vocab_size, np.int64)
    for record in records:
        if record.split != "train":
            continue
        shard = Shard(corpus / "shards" / record.file, widths)
        for index in range(record.documents):
            document = shard.document(index)
            is_target = (document.loss_mask > 0) & (document.modality == TEXT)
            counts += np.bincount(document.input_ids[is_target], minlength=vocab_size)
    return counts.tolist()
