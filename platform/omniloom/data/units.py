"""A manifest's files are gathered into units, large ones cut: one unit is one task and becomes one shard.

A unit holds at most 64 MiB; a split of less than 16 × 64 MiB is cut into up to 16 units, of at least 1 MiB each, so
that small corpora are made in parallel too. Small files are gathered. A plain jsonl is cut by byte ranges, a Parquet
file by its row groups; packed files and tars stay whole. An interleaved file is a unit of its own, 1 MiB of lines at
most: its media weigh far more than its lines.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path

from omniloom.data.config import SPLITS, Manifest, Reading, SourceSpec
from omniloom.data.readers import is_table
from omniloom.data.readers.media import (
    METADATA_EXTENSIONS,
    METADATA_STEMS,
    is_metadata,
    is_no_medium,
    media_kind,
    sidecar,
)
from omniloom.data.readers.tables import row_group_bytes
from omniloom.data.source import Unit
from omniloom.data.storage import compression_of, local_path, match_files, names_in, real_name
from omniloom.errors import DataError

LEAST_UNIT_BYTES, UNIT_BYTES = 1 << 20, 64 << 20
UNITS_WANTED = 16
LINES = ("jsonl", "chat", "preference", "interleaved")
TABLES = ("parquet", "chat", "preference")
Piece = tuple[list[str], tuple[int, int] | None]


def list_units(manifest: Manifest, folder: Path) -> list[Unit]:
    """Gather or cut the files of each source and split into units, in name order.

    The metadata of folders is a unit more: it goes with every unit of their media, but its bad lines count once.
    Raises DataError where a pattern matches no file, or one of another format; ClusterError where a store fails.
    """
    units: list[Unit] = []
    for name, source in manifest.sources.items():
        files = {split: _matching_files(folder, name, split, source) for split in SPLITS}
        named = {split: {file for file in files[split] if is_metadata(file)} for split in SPLITS}
        if source.format == "folder":
            files = {split: {f: size for f, size in files[split].items() if not is_metadata(f)} for split in SPLITS}
        heldout = set(map(real_name, files["heldout"]))
        both = [file for file in files["train"] if real_name(file) in heldout]
        if both:
            raise DataError(
                f"source {name}: {both[0]} is both trained on and held out ({len(both)} such): mend its patterns"
            )
        reading = Reading(**{field.name: getattr(source, field.name) for field in fields(Reading)})
        given: set[str] = set()  # metadata of an earlier split
        for split in SPLITS:
            pieces = [*_cut(source.format, files[split])]
            if metadata := (named[split] | _beside(files[split])) - given if source.format == "folder" else set():
                given |= metadata
                pieces.append((sorted(metadata), None))
            units += [
                Unit(f"{name}-{split}-{number:05d}", name, split, source.format, members, part, reading)
                for number, (members, part) in enumerate(pieces)
            ]
    return units


def _matching_files(folder: Path, source: str, split: str, spec: SourceSpec) -> dict[str, int]:
    """Sizes of the files that a split's patterns name, in the order of their names."""
    files: dict[str, int] = {}
    for pattern in getattr(spec, split):
        try:
            matched = match_files(folder, pattern, enters_folders=spec.format == "folder")
            for file in matched:
                file.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"source {source}: {pattern} matches a file whose name is not UTF-8: rename it") from error
        except ValueError as error:
            raise DataError(f"source {source}: {split} pattern {pattern!r} is none: {error}") from error
        except DataError as error:
            raise DataError(f"source {source}: {split} pattern {pattern!r}: {error}") from error
        if spec.format == "folder":
            matched = {file: size for file, size in matched.items() if not is_no_medium(file) or is_metadata(file)}
        if spec.format == "folder" and not any(media_kind(file) or is_metadata(file) for file in matched):
            matched = {}
        if not matched:
            what = "image, sound or video" if spec.format == "folder" else "file"
            place = pattern if local_path(pattern) is None else folder / pattern
            raise DataError(f"source {source}: no {split} {what} matches {place}")
        _refuse_other_format(source, spec.format, matched)
        files |= matched
    return dict(sorted(files.items()))


def _refuse_other_format(source: str, format: str, files: dict[str, int]) -> None:
    for file in files:
        if is_table(file) and format not in TABLES:
            raise DataError(f"source {source}: format {format} does not read {file}: set format: parquet for it")
        if not is_table(file) and format == "parquet":
            raise DataError(f"source {source}: format parquet reads files that end in .parquet, not {file}")


def _cut(format: str, files: dict[str, int]) -> Iterator[Piece]:
    """The files in pieces of about one size."""
    unit_bytes = min(max(-(-sum(files.values()) // UNITS_WANTED), LEAST_UNIT_BYTES), UNIT_BYTES)
    if format == "interleaved":
        unit_bytes = LEAST_UNIT_BYTES
    gathered: list[str] = []
    room = 0
    for file, size in files.items():
        if size > room and gathered:
            yield _with_captions(gathered) if format == "folder" else gathered, None
            gathered, room = [], 0
        parts = _parts(format, file, size, unit_bytes) if size > unit_bytes else []
        if len(parts) > 1:
            yield from (([file], part) for part in parts)
            continue
        if not gathered:
            room = unit_bytes if format not in ("interleaved", "webdataset") else 0
        gathered.append(file)
        room -= size
    if gathered:
        yield _with_captions(gathered) if format == "folder" else gathered, None


def _parts(format: str, file: str, size: int, unit_bytes: int) -> list[tuple[int, int]]:
    """Where a large file is cut, or nothing."""
    if is_table(file):
        try:
            groups = row_group_bytes(file)
        except Exception:  # damaged: its reader says so
            return []
        return _gathered_groups(groups, unit_bytes)
    if format not in LINES or compression_of(file):
        return []
    count = -(-size // unit_bytes)
    cuts = [size * number // count for number in range(count + 1)]
    return list(pairwise(cuts))


def _gathered_groups(groups: list[int], unit_bytes: int) -> list[tuple[int, int]]:
    starts, room = [], 0
    for number, size in enumerate(groups):
        if size > room:
            starts.append(number)
            room = unit_bytes
        room -= size
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _with_captions(files: list[str]) -> list[str]:
    """Media, then the text files beside them and the metadata of their folders: all that their documents depend on."""
    names = lru_cache(names_in)
    found: dict[str, None] = {}
    for file in files:
        folder, text = file.rpartition("/")[0], sidecar(file)
        if text.rpartition("/")[2] in names(folder):
            found[text] = None
        for above in _folders(folder):
            for stem, extension in product(METADATA_STEMS, METADATA_EXTENSIONS):
                if f"{stem}.{extension}" in names(above):
                    found[f"{above}/{stem}.{extension}"] = None
    return [*files, *found]


def _beside(files: dict[str, int]) -> set[str]:
    """The metadata in the folders of these files themselves; further up, where no pattern enters, it may be others'."""
    folders = {file.rpartition("/")[0] for file in files}
    return {f"{folder}/{name}" for folder in folders for name in names_in(folder) if is_metadata(name)}


def _folders(folder: str) -> Iterator[str]:
    """A folder and the three above it."""
    for _ in range(4):
        yield folder
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith(":/"):
            return
