"""Folders of media: each file with the text beside it, in a .txt of its name or a line of its folder's metadata."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.lines import read_lines
from omniloom.data.readers.media import METADATA_EXTENSIONS, METADATA_STEMS, is_metadata, media_kind, sidecar
from omniloom.data.readers.record import Place, beside, caption_of, medium, text_of
from omniloom.data.source import RawDocument, RawSegment
from omniloom.data.storage import local_path, open_file, said

FILE_KEYS = ("file_name", "file", "path", "file_path")
DELIMITERS = {"csv": ",", "tsv": "\t"}


def read_media(files: list[str], reading: Reading) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Each medium of a unit's files with its caption, or why it has none."""
    named = set(files)
    media = [file for file in files if media_kind(file)]
    captions: dict[str, str] = {}
    problems: list[str] = []
    for file in sorted((file for file in files if is_metadata(file)), key=lambda file: file.count("/")):
        try:  # the nearest folder's come last
            captions |= {name: text for name, text in _captions(file, reading, problems) if name in named}
        except Exception as error:  # a damaged file makes its reader raise anything
            problems.append(f"{file.rpartition('/')[2]}: {said(error)}")
    why = f" ({problems[0]})" if problems else ""
    for file in media:
        text_file = sidecar(file)
        record = {"file": file, "caption": captions.get(file), "text_file": text_file if text_file in named else None}
        yield Place(file, file), record | {"why": why}


def medium_document(record: dict[str, Any], place: Place, reading: Reading) -> list[RawDocument]:
    """A medium, then its caption, a target; the .txt of its name goes before its folder's metadata."""
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


def _captions(file: str, reading: Reading, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Name and text of the media that a metadata file describes; its lines that are none go to `problems`."""
    extension = file.rpartition(".")[2]
    for record in _records(file, extension, reading.limit_document_bytes, problems):
        try:
            name = next((record[key] for key in FILE_KEYS if record.get(key)), None)
            if name is None:
                raise ValueError(f"none of {', '.join(FILE_KEYS)} in a line")
            text = caption_of(record, reading)
            if text is None:
                raise ValueError(f"no text for {name}")
            path = beside(file, text_of(name, "file"))
            yield os.path.abspath(path) if local_path(file) is not None else path, text
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{file.rpartition('/')[2]}: {said(error)}")


def _records(file: str, extension: str, limit_bytes: int, problems: list[str]) -> Iterable[Any]:
    lines = _decoded(file, limit_bytes, problems)
    if extension in DELIMITERS:
        yield from csv.DictReader(lines, delimiter=DELIMITERS[extension])
        return
    for line in lines:
        try:
            if line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{file.rpartition('/')[2]}: {said(error)}")


def _decoded(file: str, limit_bytes: int, problems: list[str]) -> Iterator[str]:
    for at, line in read_lines(file, None, limit_bytes):
        try:
            if line is None:
                raise ValueError(f"the line at {at} is over limit_document_bytes={limit_bytes}")
            yield line.decode("utf-8-sig" if at == 0 else "utf-8")
        except ValueError as error:
            problems.append(f"{file.rpartition('/')[2]}: {said(error)}")
