"""A unit of files becomes one shard: its documents are woven in order, what cannot be used is skipped and named."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache, cached
from pydantic import TypeAdapter, ValidationError

from omniloom.data.index import LENGTH, Reject, ShardRecord, file_sha256, length_histogram
from omniloom.data.shards import count_by_modality, is_plain, target_ids, write_documents
from omniloom.data.source import RawDocument, Unit, read_documents
from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import MODALITIES, Document, Segment, weave
from omniloom.modality.text import TextTokenizer, load_tokenizer

MEDIA_KEPT_BYTES = 64 << 20


def unit_fingerprint(unit: Unit, tokenizer_sha256: str, modality: ModalityConfig) -> str:
    """A hash of everything a shard depends on, media included; files count by path, size and time of change."""
    files = [_file_state(Path(file)) for file in unit.files]
    if unit.format != "text":
        raws = (raw for file in unit.files for raw in read_documents(Path(file), unit.format))
        contents = (part.content for raw in raws for part in raw.segments)
        files += [_file_state(c.content) for c in contents if isinstance(c, Media) and isinstance(c.content, Path)]
    return hashlib.sha256(json.dumps([asdict(unit), files, tokenizer_sha256, asdict(modality)]).encode()).hexdigest()


def _file_state(path: Path) -> tuple[str, int, int]:
    try:
        state = path.stat()
    except (OSError, ValueError):
        return (repr(path), -1, -1)  # missing now: another fingerprint once it is there
    return (str(path), state.st_size, state.st_mtime_ns)


def tables_path(record_path: Path) -> Path:
    """Beside a shard: `lengths` (LENGTH) and `targets`, how often each id is one."""
    return record_path.with_suffix(".npz")


def read_record(path: Path) -> ShardRecord | None:
    """The record of a finished shard, or None where it never got that far or its file is cut short."""
    try:
        record = TypeAdapter(ShardRecord).validate_json(path.read_bytes())
        whole = (path.parent / record.file).stat().st_size == record.bytes and tables_path(path).is_file()
        return record if whole else None
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
    lengths: list[tuple[int, bool]] = []
    tokens = np.zeros(len(MODALITIES), np.int64)
    targets = np.zeros(tokenizer.vocab_size, np.int64)
    for _, document in write_documents(path, _woven(unit, tokenizer, modality, rejects)):
        lengths.append((len(document), is_plain(document)))
        tokens += count_by_modality(document)
        np.add.at(targets, target_ids(document), 1)
    table = np.array(lengths, LENGTH)
    np.savez(tables_path(record_path), lengths=table, targets=targets)
    record = ShardRecord(
        file=path.name,
        source=unit.source,
        split=unit.split,
        fingerprint=fingerprint,
        sha256=file_sha256(path),
        bytes=path.stat().st_size,
        documents=len(lengths),
        tokens=int(tokens.sum()),
        media_tokens=dict(zip(MODALITIES[1:], tokens[1:].tolist(), strict=True)),
        lengths=length_histogram(table["tokens"]),
        rejects=rejects,
    )
    record_path.write_bytes(TypeAdapter(ShardRecord).dump_json(record, indent=1))
    return record


def _woven(
    unit: Unit, tokenizer: TextTokenizer, modality: ModalityConfig, rejects: list[Reject]
) -> Iterator[tuple[str, Document]]:
    # Documents may share their media: what was read lately is kept.
    kept: LRUCache[Any, list[Segment]] = LRUCache(
        MEDIA_KEPT_BYTES, getsizeof=lambda held: sum(segment.content.nbytes for segment in held)
    )
    read = cached(kept)(partial(read_media, config=modality))
    for file in unit.files:
        for raw in read_documents(Path(file), unit.format):
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
        if isinstance(part.content, Media):
            segments += read(part.kind, part.content)
        else:
            segments.append(tokenizer.segment(part.content, part.is_target))
    return weave(segments, tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, modality.widths)
