"""A manifest names files; a file is a sequence of documents of raw segments."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from omniloom.data.config import SPLITS, Manifest, SourceSpec, Split
from omniloom.errors import DataError, did_you_mean
from omniloom.modality.files import Media
from omniloom.modality.sequence import MODALITIES

UNIT_BYTES = 1 << 20  # files are gathered into units of about this size; one unit becomes one shard
SEGMENT_KEYS = (*MODALITIES, "loss")
REASON_CHARACTERS = 200
MOST_SOURCES = 256  # the `source` field is one byte


@dataclass(frozen=True)
class Unit:
    """The files of one source and split that become one shard."""

    name: str
    source: str
    split: Split
    format: str
    files: list[str]


@dataclass(frozen=True)
class RawSegment:
    """Text, or a medium; `is_target` says whether its text is learned."""

    kind: str  # text, image, audio or video
    content: str | Media
    is_target: bool


@dataclass(frozen=True)
class RawDocument:
    """One document before its media are read. `problem` is set instead of segments where it cannot be read."""

    name: str
    segments: list[RawSegment]
    problem: str | None = None


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; raises DataError naming the wrong key and the nearest valid one."""
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise DataError(f"no manifest at {path} {near}: set manifest=<yaml file>".replace(" :", ":"))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a date that is none
        raise DataError(f"manifest {path} is not YAML: {error}") from error
    _refuse_unknown_keys(path, content)
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"manifest {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not 1 <= len(manifest.sources) <= MOST_SOURCES:
        raise DataError(f"manifest {path} names {len(manifest.sources)} sources; 1 to {MOST_SOURCES} are possible")
    for name, source in manifest.sources.items():
        if source.weight < 0 or source.loss_weight < 0:
            raise DataError(f"manifest {path}: the weights of source {name} must not be negative")
        if not (math.isfinite(source.weight) and math.isfinite(source.loss_weight)):
            raise DataError(f"manifest {path}: the weights of source {name} must be finite")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"manifest {path}: source name {name!r} begins file names: letters, digits, _ . - only")
    return manifest


def _refuse_unknown_keys(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("sources"), dict):
        raise DataError(f"manifest {path} must have a mapping `sources:` of name to source")
    levels: list[tuple[dict[Any, Any], Any, str]] = [(content, Manifest, "")]
    levels += [(s, SourceSpec, f"sources.{n}.") for n, s in content["sources"].items() if isinstance(s, dict)]
    for mapping, spec, prefix in levels:
        valid = spec.__dataclass_fields__
        for key in mapping:
            if key not in valid:
                raise DataError(f"manifest {path}: unknown key {prefix}{key}; {did_you_mean(str(key), valid)}")


def list_units(manifest: Manifest, folder: Path) -> list[Unit]:
    """Gather the files of each source and split into units, in name order; raises DataError where a glob is empty."""
    units: list[Unit] = []
    for source_name, source in manifest.sources.items():
        files = {split: _matching_files(folder, source_name, split, getattr(source, split)) for split in SPLITS}
        both = sorted(set(files["train"]) & set(files["heldout"]))
        if both:
            raise DataError(
                f"source {source_name}: {both[0]} is both trained on and held out ({len(both)} such): mend its patterns"
            )
        for split in SPLITS:
            gathered: list[list[str]] = []
            room = 0
            for file in files[split]:
                size = file.stat().st_size
                if size > room:
                    gathered.append([])
                    # An interleaved file is a unit of its own: its media weigh far more than its lines.
                    room = UNIT_BYTES if source.format == "text" else 0
                gathered[-1].append(str(file))
                room -= size
            units += [
                Unit(f"{source_name}-{split}-{number:05d}", source_name, split, source.format, members)
                for number, members in enumerate(gathered)
            ]
    return units


def _matching_files(folder: Path, source: str, split: str, patterns: list[str]) -> list[Path]:
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        base, relative = (
            (Path(path.anchor), str(path.relative_to(path.anchor))) if path.is_absolute() else (folder, pattern)
        )
        try:
            matched = [file.resolve() for file in base.glob(relative) if file.is_file()]
        except (ValueError, IndexError) as error:  # what pathlib raises for patterns it cannot read
            raise DataError(f"source {source}: {split} pattern {pattern!r} is none: {error}") from error
        if not matched:
            raise DataError(f"source {source}: no {split} file matches {base / relative}")
        files.update(matched)
    return sorted(files)


def read_documents(file: Path, format: str) -> Iterator[RawDocument]:
    """The documents of one file: a text file is one, an interleaved jsonl has one a line."""
    if format == "text":
        yield _text_document(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _interleaved_document(f"{file}:{number}", line, file.parent)


def _text_document(file: Path) -> RawDocument:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return RawDocument(str(file), [], f"not UTF-8 at byte {error.start}")
    if not text.strip():
        return RawDocument(str(file), [], "empty")
    return RawDocument(str(file), [RawSegment("text", text, is_target=True)])


def _interleaved_document(name: str, line: bytes, folder: Path) -> RawDocument:
    try:
        segments = [_segment(entry, folder) for entry in json.loads(line)["segments"]]
        if not segments:
            raise ValueError("no segments")
    except UnicodeDecodeError as error:
        return RawDocument(name, [], f"not UTF-8 at byte {error.start}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
        return RawDocument(name, [], f'not {{"segments": [{{"text": …}}, {{"image": …}}, …]}}: {said}')
    return RawDocument(name, segments)


def _segment(entry: Any, folder: Path) -> RawSegment:
    if not isinstance(entry, dict):
        raise ValueError("a segment is a mapping")
    unknown = [key for key in entry if key not in SEGMENT_KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}; {did_you_mean(unknown[0], SEGMENT_KEYS)}")
    kinds = [key for key in MODALITIES if key in entry]
    if len(kinds) != 1:
        raise ValueError(f"a segment is one of {', '.join(MODALITIES)}")
    kind, content = kinds[0], entry[kinds[0]]
    is_target = entry.get("loss", kind == "text")
    if not isinstance(is_target, bool):
        raise ValueError("loss must be true or false")
    if not isinstance(content, str):
        raise ValueError(f"{kind} must be a string")
    content.encode()  # half of a surrogate pair is no text
    if kind == "text":
        return RawSegment(kind, content, is_target)
    if is_target:
        raise ValueError(f"{kind} cannot be a target")
    return RawSegment(kind, Media(content, folder / content), is_target=False)
