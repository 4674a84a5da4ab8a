"""A unit's files become raw documents, as a stream; what cannot be read is a document with its problem.

By format: `text` one document a file; `jsonl`, `chat`, `preference` and `interleaved` one record a line (chat and
preference also of a Parquet file's rows); `parquet` one document a row; `webdataset` one a sample of a tar; `folder`
one a medium with its caption. A name is `file`, or `file@place` (source.RawDocument).
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.chat import chat_document, preference_document
from omniloom.data.readers.folder import medium_document, read_media
from omniloom.data.readers.interleaved import interleaved_document
from omniloom.data.readers.lines import read_lines
from omniloom.data.readers.media import is_no_medium
from omniloom.data.readers.record import TEXT_KEYS, Build, Place, documents_of, table_document, text_document
from omniloom.data.readers.tables import holds_bytes, read_rows
from omniloom.data.readers.webdataset import read_samples, sample_document
from omniloom.data.source import RawDocument, RawSegment, RemoteMedia, Unit
from omniloom.data.storage import file_state, open_content, said
from omniloom.errors import OmniloomError
from omniloom.modality.dialogue import text_of
from omniloom.modality.files import Media

# One document a record, whatever holds the records.
RECORDS: dict[str, Build] = {
    "jsonl": text_document,
    "chat": chat_document,
    "preference": preference_document,
    "interleaved": interleaved_document,
    "parquet": table_document,
}
COLUMNS = {
    "chat": ("messages", "conversations", "instruction", "input", "output"),
    "preference": ("prompt", "chosen", "rejected"),
}
MEDIA_MARKS = (b"image", b"audio", b"video", b"\\u")  # one is in every chat line with a medium; \u may hide a letter
NAMING_MEDIA = ("chat", "preference", "interleaved", "parquet")  # formats whose documents name files of their own


def read_documents(unit: Unit) -> Iterator[RawDocument]:
    """The documents of a unit in order, in constant memory; raises ClusterError where a store fails.

    A file that breaks off is one document more, with the reason: what stands behind the damage is lost.
    """
    if unit.format == "folder":
        for place, record in read_media(unit.files, unit.reading):
            yield from _guarded(place.name, documents_of(lambda: record, place, unit.reading, medium_document))  # noqa: B023
        return
    for file in unit.files:
        yield from _guarded(file, _file_documents(unit, file))


def _guarded(file: str, documents: Iterator[RawDocument]) -> Iterator[RawDocument]:
    count = 0
    try:
        for document in documents:
            yield document
            count += 1
    except OmniloomError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise anything
        read = f"cannot be read after {count} documents" if count else "cannot be read"
        yield RawDocument(file, [], f"{read}: {said(error)}")


def _file_documents(unit: Unit, file: str) -> Iterator[RawDocument]:
    reading = unit.reading
    if unit.format == "text":
        yield from documents_of(partial(_text, file, reading), Place(file, file), reading, _text_document)
    elif unit.format == "webdataset":
        for key, sample in read_samples(file, reading):
            name = f"{file}@{key}".encode("utf-8", "backslashreplace").decode()
            yield from documents_of(lambda: sample, Place(name, file), reading, sample_document)  # noqa: B023
    else:
        for at, read in _records(unit, file):
            yield from documents_of(read, Place(f"{file}@{at}", file), reading, RECORDS[unit.format])


def _records(unit: Unit, file: str) -> Iterator[tuple[int, Any]]:
    """Place and reader of each record of a jsonl or Parquet file; empty lines are none."""
    limit = unit.reading.limit_document_bytes
    if is_table(file):
        for at, row in read_rows(file, unit.part, _columns(unit), limit):
            yield at, partial(_within, row, "row", limit)
        return
    for at, line in read_lines(file, unit.part, limit):
        if line is None or line.strip():
            yield at, partial(_parsed, at, line, limit)


def is_table(file: str) -> bool:
    """Whether a file is read by rows, as Parquet; else by lines."""
    return file.lower().endswith(".parquet")


def _columns(unit: Unit) -> tuple[str, ...]:
    if unit.format in COLUMNS:
        return COLUMNS[unit.format]
    reading = unit.reading
    texts = (reading.text_key,) if reading.text_key is not None else TEXT_KEYS
    return (*texts, reading.image_key, reading.audio_key, reading.video_key)


def _within(record: Any, what: str, limit: int) -> Any:
    if record is None:
        raise ValueError(f"the {what} is over limit_document_bytes={limit}: raise it for the source, or leave it out")
    return record


def _parsed(at: int, line: bytes | None, limit: int) -> Any:
    return json.loads(_within(line, "line", limit).decode("utf-8-sig" if at == 0 else "utf-8"))


def _text(file: str, reading: Reading) -> str:
    limit = reading.limit_document_bytes
    with open_content(file) as stream:
        data = stream.read(limit + 1)
    return _within(data if len(data) <= limit else None, "file", limit).decode()


def _text_document(text: str, place: Place, reading: Reading) -> list[RawDocument]:
    return [RawDocument(place.name, [RawSegment("text", text_of(text, ""), is_target=True)])]


def unit_state(unit: Unit) -> list[Any]:
    """What changes when a unit's input does: the state of its files, and of the media that their documents name."""
    states = [file_state(file) for file in unit.files]
    if unit.format == "folder" and all(map(is_no_medium, unit.files)):
        states += [[document.name, document.problem] for document in read_documents(unit)]  # what its lines miss
    for file in unit.files if unit.format in NAMING_MEDIA else []:
        for document in _guarded(file, _file_documents(unit, file)) if _may_name_media(unit, file) else []:
            for segment in document.segments:
                if isinstance(segment.content, RemoteMedia):
                    states.append(file_state(segment.content.url))
                elif isinstance(segment.content, Media) and not isinstance(segment.content.content, bytes):
                    states.append(file_state(str(segment.content.content)))
    return states


def _may_name_media(unit: Unit, file: str) -> bool:
    """False where it is plain to see that no document does: then none is read for the media that it names."""
    reading = unit.reading
    try:
        if unit.format == "parquet":
            return not holds_bytes(file, (reading.image_key, reading.audio_key, reading.video_key))
        if unit.format in COLUMNS and not is_table(file):
            lines = (line for _, line in read_lines(file, unit.part, reading.limit_document_bytes) if line)
            return any(mark in line for line in lines for mark in MEDIA_MARKS)
    except OmniloomError:
        raise
    except Exception:  # damaged: its documents say what can be read
        return True
    return True
