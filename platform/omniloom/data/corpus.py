"""The tokenize job: a manifest's files become a corpus of shards, by Ray Data tasks; the driver reads no media."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
from pydantic import TypeAdapter
from tqdm import tqdm

from omniloom.data.config import CorpusConfig, Manifest
from omniloom.data.manifest import read_manifest
from omniloom.data.samples import write_samples
from omniloom.data.shards import (
    Corpus,
    Index,
    Reject,
    ShardRecord,
    SourceRecord,
    count_targets,
    file_sha256,
    unit_fingerprint,
    write_shard,
)
from omniloom.data.source import Unit
from omniloom.data.units import list_units
from omniloom.data.vocabulary import build_tokenizer
from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.text import load_tokenizer

REJECTS_NAMED = 20


def open_or_build(config: CorpusConfig) -> Corpus:
    """The corpus that a configuration names, made first where it is not there and files to make it of are named."""
    folder = Path(config.corpus or "")
    if (config.manifest or config.samples) and not (folder / "index.json").is_file():
        build_corpus(config)
    return Corpus(folder)


def build_corpus(config: CorpusConfig) -> Corpus:
    """Turn a manifest's files into shards and write the index last; an equal finished corpus is kept.

    Sample files, where asked for, are written beside the shards first. Restartable: finished shards of the same input
    are kept. Raises DataError where another corpus stands in the folder, or where more than `max_reject_share` of the
    documents had to be skipped.
    """
    config.check_corpus()
    corpus = Path(config.corpus or "").absolute()
    manifest_path = write_samples(config.samples, corpus / "files") if config.samples else Path(config.manifest or "")
    manifest = read_manifest(manifest_path)
    units = list_units(manifest, manifest_path.absolute().parent)
    if config.force:
        for part in ("index.json", "tokenizer.json", "shards"):
            path = corpus / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (corpus / "index.json").is_file():
        return _same_or_refuse(corpus, manifest, units, config.modality)
    (corpus / "shards").mkdir(parents=True, exist_ok=True)

    train_units = [unit for unit in units if unit.split == "train"]
    build_tokenizer(train_units, config.tokenizer, corpus)
    records = list(_write_shards(units, corpus, config.modality))
    _refuse_too_many_rejects(records, config.max_reject_share)
    vocab_size = load_tokenizer(corpus / "tokenizer.json").vocab_size
    counts = ray.get(
        ray.remote(count_targets).options(num_cpus=1).remote(corpus, records, config.modality.widths, vocab_size)
    )
    index = Index(
        tokenizer_sha256=file_sha256(corpus / "tokenizer.json"),
        vocab_size=vocab_size,
        modality=config.modality,
        sources=_source_records(manifest),
        shards=records,
        target_counts=counts,
    )
    (corpus / "index.json").write_bytes(TypeAdapter(Index).dump_json(index, indent=1))
    return Corpus(corpus)


def _source_records(manifest: Manifest) -> list[SourceRecord]:
    return [SourceRecord(name, spec.weight, spec.loss_weight) for name, spec in manifest.sources.items()]


def _same_or_refuse(folder: Path, manifest: Manifest, units: list[Unit], modality: ModalityConfig) -> Corpus:
    corpus = Corpus(folder)
    fingerprint = ray.remote(unit_fingerprint).options(num_cpus=1)
    asked = [fingerprint.remote(unit, corpus.index.tokenizer_sha256, modality) for unit in units]
    wanted = dict(zip((unit.name for unit in units), ray.get(asked), strict=True))
    built = {Path(record.file).stem: record.fingerprint for record in corpus.index.shards}
    if wanted != built or corpus.index.sources != _source_records(manifest):
        changed = sorted(name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name))
        raise DataError(
            f"{folder} holds a corpus of other input (its hash {corpus.sha256[:12]}; "
            f"{len(changed)} units differ{', first ' + changed[0] if changed else ''}): "
            "name another corpus=<folder>, or rebuild this one with force=true"
        )
    return corpus


def _write_shards(units: list[Unit], corpus: Path, modality: ModalityConfig) -> Iterator[ShardRecord]:
    """One Ray Data task per unit; the records come back in the units' order whatever finished first."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar below says it all
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True

    def shard(row: dict[str, Any]) -> dict[str, Any]:
        unit = TypeAdapter(Unit).validate_json(row["unit"])
        return {"record": TypeAdapter(ShardRecord).dump_json(write_shard(unit, corpus, modality))}

    # As JSON: Arrow would give the rows' nested lists back as arrays.
    rows = [{"unit": TypeAdapter(Unit).dump_json(unit)} for unit in units]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(shard)
    for row in tqdm(done.iter_rows(), total=len(units), desc="tokenize", unit="shard"):
        yield TypeAdapter(ShardRecord).validate_json(row["record"])


def _refuse_too_many_rejects(records: list[ShardRecord], limit: float) -> None:
    rejects = [reject for record in records for reject in record.rejects]
    documents = sum(record.documents for record in records) + len(rejects)
    if not documents:
        raise DataError("the manifest's files hold no document")
    if rejects and len(rejects) > limit * documents:
        raise DataError(
            f"{len(rejects)} of {documents} documents cannot be used, {len(rejects) / documents:.2%}, over "
            f"max_reject_share={limit:.2%}:\n{_named(rejects)}\nmend the files, or raise max_reject_share"
        )


def _named(rejects: list[Reject]) -> str:
    named = [f"  {reject.name}: {reject.reason}" for reject in rejects[:REJECTS_NAMED]]
    if len(rejects) > REJECTS_NAMED:
        named.append(f"  … and {len(rejects) - REJECTS_NAMED} more, all in the shards' json files")
    return "\n".join(named)


def describe(corpus: Corpus) -> str:
    """One line a split and source: documents, tokens, media; then what was skipped, by name and reason."""
    lines = []
    for split in ("train", "heldout"):
        records = [record for record in corpus.index.shards if record.split == split]
        for source in corpus.index.sources:
            mine = [record for record in records if record.source == source.name]
            if mine:
                tokens, media = sum(r.tokens for r in mine), sum(sum(r.media_tokens.values()) for r in mine)
                documents, skipped = sum(r.documents for r in mine), sum(len(r.rejects) for r in mine)
                lines.append(
                    f"  {split:8} {source.name:12} {documents:>8,} documents {tokens:>12,} tokens "
                    f"({media:,} of media), {skipped} skipped"
                )
    rejects = [reject for record in corpus.index.shards for reject in record.rejects]
    if rejects:
        lines.append(f"skipped:\n{_named(rejects)}")
    return "\n".join([f"corpus {corpus.folder} ({corpus.index.vocab_size:,} ids)", *lines])
