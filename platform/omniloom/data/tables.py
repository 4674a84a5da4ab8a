"""The shards' records become the corpus's tables, and last of all its index."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from omniloom.data.config import SPLITS, Manifest, SourceSpec
from omniloom.data.corpus import INDEX, REJECTS, SHARD_TABLE, TARGETS, TOKENIZER, lengths_file, shards_file
from omniloom.data.index import PREFERENCE, Index, Reject, ShardRecord, SourceRecord, SplitRecord, Table, file_sha256
from omniloom.data.write import tables_path
from omniloom.modality.config import ModalityConfig
from omniloom.modality.text import load_tokenizer


def write_index(corpus: Path, manifest: Manifest, records: list[ShardRecord], modality: ModalityConfig) -> None:
    """Join the shards' tables, in the records' order, and write the index, the corpus's commit."""
    vocab_size = load_tokenizer(corpus / TOKENIZER).vocab_size
    targets = np.zeros(vocab_size, np.int64)
    sources = {name: source_record(name, spec) for name, spec in manifest.sources.items()}
    for split in SPLITS:
        mine = [record for record in records if record.split == split]
        with (corpus / lengths_file(split)).open("wb") as lengths:
            for record in mine:
                with np.load(tables_path(corpus / "shards" / record.file)) as tables:
                    lengths.write(tables["lengths"].tobytes())
                    if split == "train":
                        targets += tables["targets"]
                sources[record.source].split(split).add(SplitRecord.of(record))
        _write_shard_table(corpus / shards_file(split), mine)
    with (corpus / REJECTS).open("wb") as lines:
        for record in records:
            for reject in record.rejects:
                lines.write(TypeAdapter(Reject).dump_json(reject) + b"\n")
    (corpus / TARGETS).write_text(json.dumps(targets.tolist()))
    names = [TOKENIZER, TARGETS, REJECTS, *(name(split) for split in SPLITS for name in (shards_file, lengths_file))]
    tables = {name: Table(file_sha256(corpus / name), (corpus / name).stat().st_size) for name in names}
    index = Index(vocab_size, modality, list(sources.values()), tables)
    (corpus / INDEX).write_bytes(TypeAdapter(Index).dump_json(index, indent=1))


def source_record(name: str, spec: SourceSpec) -> SourceRecord:
    """A source of which nothing is read yet. Preference pairs stay out of the stream: half of them is no example."""
    return SourceRecord(name, 0.0 if spec.format == PREFERENCE else spec.weight, spec.loss_weight, spec.format)


def _write_shard_table(path: Path, records: list[ShardRecord]) -> None:
    first = np.cumsum([0, *(record.documents for record in records)])[:-1].tolist()
    rows = [asdict(record) | {"first_document": number} for record, number in zip(records, first, strict=True)]
    table = pa.Table.from_pylist(rows, SHARD_TABLE)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SHARD_TABLE) as writer:
        writer.write_table(table)
