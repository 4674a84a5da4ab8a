"""A unit of files becomes one shard: its documents are woven in order, what cannot be used is skipped and named."""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from omniloom.data.config import DecodeConfig
from omniloom.data.decode import shared_decoders
from omniloom.data.heap import trim_heap
from omniloom.data.index import LENGTH, Reject, ShardRecord, file_sha256, length_histogram
from omniloom.data.readers import read_documents, unit_state
from omniloom.data.shards import count_by_modality, is_plain, target_ids, write_documents
from omniloom.data.source import RawDocument, Unit
from omniloom.data.weave import Weaver
from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.sequence import MODALITIES, Document
from omniloom.modality.text import TextTokenizer, load_tokenizer

TRIMMED_BYTES = 64 << 20  # of documents, after which free memory is given back

VERSION = 1  # of what readers, decoders and weaving make of a file: counted up with every change of it


def unit_fingerprint(unit: Unit, tokenizer_sha256: str, modality: ModalityConfig) -> str:
    """A hash of everything a shard depends on, media included; files count by path, size and time of change."""
    files = unit_state(unit)
    return hashlib.sha256(
        json.dumps([VERSION, asdict(unit), files, tokenizer_sha256, asdict(modality)]).encode()
    ).hexdigest()


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


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> TextTokenizer:
    """Read once for all shards that a process writes: a large vocabulary takes as long as a megabyte of text."""
    return load_tokenizer(path)


def write_shard(unit: Unit, corpus: Path, modality: ModalityConfig, limits: DecodeConfig) -> ShardRecord:
    """Read a unit's files, media included, and write its shard; a finished shard of the same input is kept."""
    tokenizer_sha256 = file_sha256(corpus / "tokenizer.json")
    tokenizer = _tokenizer(corpus / "tokenizer.json", tokenizer_sha256)
    fingerprint = unit_fingerprint(unit, tokenizer_sha256, modality)
    record_path = corpus / "shards" / f"{unit.name}.json"
    done = read_record(record_path)
    # Other limits may let through what they rejected; a document that was read is the same under any.
    if done is not None and done.fingerprint == fingerprint and (not done.rejects or done.limits == limits):
        return done
    record_path.unlink(missing_ok=True)
    path = record_path.with_suffix(".arrow")
    rejects: list[Reject] = []
    lengths, plain = array("i"), bytearray()  # a few bytes a document: a packed file may hold many millions
    tokens = np.zeros(len(MODALITIES), np.int64)
    targets = np.zeros(tokenizer.vocab_size, np.int64)
    weaver = Weaver(tokenizer, shared_decoders(modality, limits, Path(tempfile.gettempdir())))

    def usable() -> Iterator[tuple[RawDocument, Document]]:
        for raw, woven in weaver.weave(read_documents(unit)):
            if isinstance(woven, DataError):
                rejects.append(Reject(raw.name, str(woven)))
            else:
                yield raw, woven

    held = 0
    for document in write_documents(path, usable()):
        held += document.nbytes
        if held > TRIMMED_BYTES:
            trim_heap()  # Ray's jemalloc joins no freed pieces unasked: a worker would grow by every shard
            held = 0
        lengths.append(len(document))
        plain.append(is_plain(document))
        tokens += count_by_modality(document)
        np.add.at(targets, target_ids(document), 1)
    trim_heap()
    table = np.zeros(len(lengths), LENGTH)
    table["tokens"], table["plain"] = lengths, plain
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
        limits=limits,
    )
    record_path.write_bytes(TypeAdapter(ShardRecord).dump_json(record, indent=1))
    return record
