"""The tokenize job: a manifest's files become a corpus of shards, by Ray Data tasks; the driver reads no media."""

import logging
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import ray.data
from pydantic import TypeAdapter
from tqdm import tqdm

from omniloom.data.config import SPLITS, CorpusConfig, Manifest
from omniloom.data.corpus import INDEX, REJECTS, TOKENIZER, Corpus
from omniloom.data.index import Reject, ShardRecord, SourceRecord
from omniloom.data.manifest import read_manifest
from omniloom.data.samples import write_samples
from omniloom.data.source import Unit
from omniloom.data.tables import source_record, write_index
from omniloom.data.units import list_units
from omniloom.data.vocabulary import TOKENIZER_MADE, build_tokenizer, refuse_other_tokenizer
from omniloom.data.write import unit_fingerprint, write_shard
from omniloom.errors import DataError

REJECTS_NAMED = 20


def open_or_build(config: CorpusConfig) -> Corpus:
    """The corpus that a configuration names, made first where it is not there and files to make it of are named."""
    folder = Path(config.corpus or "")
    if (config.manifest or config.samples) and not (folder / INDEX).is_file():
        build_corpus(config)
    corpus = Corpus(folder)
    corpus.verify()
    return corpus


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
        for part in (INDEX, TOKENIZER, TOKENIZER_MADE, "shards", "plans"):
            path = corpus / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (corpus / INDEX).is_file():
        return _same_or_refuse(corpus, manifest, units, config)
    (corpus / "shards").mkdir(parents=True, exist_ok=True)

    train_units = [unit for unit in units if unit.split == "train"]
    build_tokenizer(train_units, config.tokenizer, corpus)
    records = list(_write_shards(units, corpus, config))
    _refuse_too_many_rejects(records, config.max_reject_share)
    ray.get(ray.remote(write_index).options(num_cpus=1).remote(corpus, manifest, records, config.modality))
    return Corpus(corpus)


def _same_or_refuse(folder: Path, manifest: Manifest, units: list[Unit], config: CorpusConfig) -> Corpus:
    corpus = Corpus(folder)
    corpus.verify()
    ray.get(ray.remote(refuse_other_tokenizer).options(num_cpus=1).remote(config.tokenizer, folder))
    fingerprint = ray.remote(unit_fingerprint).options(num_cpus=1)
    asked = [fingerprint.remote(unit, corpus.index.files[TOKENIZER].sha256, config.modality) for unit in units]
    wanted = dict(zip((unit.name for unit in units), ray.get(asked), strict=True))
    built = {
        Path(shard["file"]).stem: shard["fingerprint"]
        for split in SPLITS
        for shard in corpus.shard_table(split).to_pylist()
    }
    weighed = [SourceRecord(s.name, s.weight, s.loss_weight, s.format) for s in corpus.index.sources]
    if wanted != built or weighed != [source_record(name, spec) for name, spec in manifest.sources.items()]:
        changed = sorted(name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name))
        raise DataError(
            f"{folder} holds a corpus of other input (its hash {corpus.sha256[:12]}; "
            f"{len(changed)} units differ{', first ' + changed[0] if changed else ''}): "
            "name another corpus=<folder>, or rebuild this one with force=true"
        )
    return corpus


def _write_shards(units: list[Unit], corpus: Path, config: CorpusConfig) -> Iterator[ShardRecord]:
    """One Ray Data task per unit; the records come back in the units' order whatever finished first."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar below says it all
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True

    def shard(row: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core; the node's others have tasks of their own
        unit = TypeAdapter(Unit).validate_json(row["unit"])
        return {"record": TypeAdapter(ShardRecord).dump_json(write_shard(unit, corpus, config.modality, config.decode))}

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
            f"max_reject_share={limit:.2%}:\n{_named(rejects, len(rejects))}\nmend the files, or raise max_reject_share"
        )


def _named(rejects: list[Reject], count: int) -> str:
    named = [f"  {reject.name}: {reject.reason}" for reject in rejects[:REJECTS_NAMED]]
    if count > REJECTS_NAMED:
        named.append(f"  … and {count - REJECTS_NAMED} more, all in {REJECTS} or the shards' json files")
    return "\n".join(named)


def describe(corpus: Corpus) -> str:
    """One line a split and source: documents, tokens, media; then what was skipped, by name and reason."""
    lines = [f"corpus {corpus.folder} ({corpus.index.vocab_size:,} ids)"]
    for split in SPLITS:
        for source in corpus.index.sources:
            held = source.split(split)
            if held.shards:
                media = ", ".join(f"{count:,} of {kind}" for kind, count in held.media_tokens.items() if count)
                lines.append(
                    f"  {split:8} {source.name:12} {held.documents:>8,} documents {held.tokens:>12,} tokens "
                    f"({media or '0 of media'}), {held.rejects} skipped"
                )
    rejects = list(islice(corpus.rejects(), REJECTS_NAMED))
    if rejects:
        count = sum(source.split(split).rejects for source in corpus.index.sources for split in SPLITS)
        lines.append(f"skipped:\n{_named(rejects, count)}")
    return "\n".join(lines)
