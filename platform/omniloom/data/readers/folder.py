"""Folders of media: each file with the text beside it, in a .txt of its name or a line of its folder's metadata."""

import csv
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.lines import read_lines
from omniloom.data.readers.media import (
    METADATA_EXTENSIONS,
    METADATA_STEMS,
    is_metadata,
    is_no_medium,
    media_kind,
    sidecar,
    unknown,
)
from omniloom.data.readers.record import Place, beside, caption_of, medium
from omniloom.data.source import RawDocument, RawSegment
from omniloom.data.storage import local_path, names_in, open_file, said
from omniloom.modality.dialogue import text_of

FILE_KEYS = ("file_name", "file", "path", "file_path")
DELIMITERS = {"csv": ",", "tsv": "\t"}
Problem = tuple[str, str]  # the name of a line, or of a file; a reason


def read_media(files: list[str], reading: Reading) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Each medium of a unit's files with its caption, or why it has none.

    A file of unknown kind is given with its problem. Metadata by itself gives its bad lines: see units.list_units.
    """
    named = set(files)
    media = [file for file in files if not is_no_medium(file)]
    if not media:
        for file in files:
            yield from ((Place(name, file), {"problem": reason}) for name, reason in _bad_lines(file, reading))
        return
    captions: dict[str, str] = {}
    problems: list[Problem] = []
    for file in sorted((file for file in files if is_metadata(file)), key=lambda file: file.count("/")):
        try:  # the nearest folder's come last
            for line, path, described in _described(file, reading, problems):
                if path in named and (text := _text(described, line, reading, problems)) is not None:
                    captions[path] = text
        except Exception as error:  # a damaged file makes its reader raise anything
            problems.append((file, said(error)))
    why = f" ({problems[0][0].rpartition('/')[2]}: {problems[0][1]})" if problems else ""
    for file in media:
        text_file = sidecar(file)
        record = {"file": file, "caption": captions.get(file), "text_file": text_file if text_file in named else None}
        yield Place(file, file), record | {"why": why, "problem": None if media_kind(file) else unknown(file)}


def _bad_lines(file: str, reading: Reading) -> list[Problem]:
    """The lines of a metadata file that cannot be read or name a file that is not there."""
    problems: list[Problem] = []
    names = lru_cache(names_in)
    try:
        for line, path, _ in _described(file, reading, problems):
            folder, _, name = path.rpartition("/")
            if not (os.path.isfile(path) if local_path(path) is not None else name in names(folder)):
                problems.append((line, f"names a file that is not there: {name[:100]}"))
    except Exception as error:  # a damaged file makes its reader raise anything
        problems.append((file, said(error)))
    return problems


def medium_document(record: dict[str, Any], place: Place, reading: Reading) -> list[RawDocument]:
    """A medium, then its caption, a target; the .txt of its name goes before its folder's metadata."""
    if record["problem"] is not None:
        raise ValueError(record["problem"])
    text = record["caption"]
    if record["text_file"] is not None:
        text = text_of(_short_text(record["text_file"], reading.limit_document_bytes), "its .txt")
    if text is None:
        known = f"{'|'.join(METADATA_STEMS)}.{'|'.join(METADATA_EXTENSIONS)}"
        raise ValueError(f"no caption: neither a .txt of its name nor a line of {known} in its folders{record['why']}")
    kind = str(media_kind(record["file"]))
    name = record["file"].rpartition("/")[2]
    return [
        RawDocument(place.name, [medium(kind, name, place), RawSegment("text", text, is_target=True)]),
    ]


def _short_text(file: str, limit_bytes: int) -> str:
    with open_file(file) as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"its .txt is over limit_document_bytes={limit_bytes}")
    return data.decode("utf-8-sig")


def _text(described: dict[str, Any], line: str, reading: Reading, problems: list[Problem]) -> str | None:
    """The caption in a line; where there is none, `problems` is told."""
    try:
        text = caption_of(described, reading)
        if text is None:
            raise ValueError("no text")
        return text
    except ValueError as error:
        problems.append((line, said(error)))
        return None


def _described(file: str, reading: Reading, problems: list[Problem]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Line, file and record of what a metadata file describes; its lines that describe none go to `problems`."""
    extension = file.rpartition(".")[2]
    for line, record in _records(file, extension, reading.limit_document_bytes, problems):
        try:
            name = next((record[key] for key in FILE_KEYS if record.get(key)), None)
            if name is None:
                raise ValueError(f"none of {', '.join(FILE_KEYS)} in a line")
            path = beside(file, text_of(name, "file"))
            yield line, os.path.abspath(path) if local_path(file) is not None else path, record
        except (ValueError, TypeError, AttributeError) as error:
            problems.append((line, said(error)))


def _records(file: str, extension: str, limit_bytes: int, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    lines = _decoded(file, limit_bytes, problems)
    if extension in DELIMITERS:
        rows = csv.DictReader((text for _, text in lines), delimiter=DELIMITERS[extension])
        yield from ((f"{file}@{number}", row) for number, row in enumerate(rows))
        return
    for line, text in lines:
        try:
            if text.strip():
                yield line, json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.append((line, said(error)))


def _decoded(file: str, limit_bytes: int, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    for at, line in read_lines(file, None, limit_bytes):
        try:
            if line is None:
                raise ValueError(f"the line is over limit_document_bytes={limit_bytes}")
            yield f"{file}@{at}", line.decode("utf-8-sig" if at == 0 else "utf-8")
        except ValueError as error:
            problems.append((f"{file}@{at}", said(error)))
