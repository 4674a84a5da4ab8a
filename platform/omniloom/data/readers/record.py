"""A record, one line or one row, becomes documents; what is wrong with it is a problem of its documents."""

import base64
import binascii
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniloom.data.config import Reading
from omniloom.data.source import RawDocument, RawSegment, RemoteMedia
from omniloom.data.storage import local_path, protocol_of, refuse_protocol, said
from omniloom.errors import DataError
from omniloom.modality.dialogue import text_of
from omniloom.modality.files import Media

TEXT_KEYS = ("text", "caption", "transcript", "transcription", "sentence")


@dataclass(frozen=True)
class Place:
    """Where a record stands: the name of its documents, and its file, which the media it names stand beside."""

    name: str
    file: str


Build = Callable[[Any, Place, Reading], list[RawDocument]]


def documents_of(read: Callable[[], Any], place: Place, reading: Reading, build: Build) -> Iterator[RawDocument]:
    """What `build` makes of the record that `read` gives, or one document with the problem."""
    try:
        built = build(read(), place, reading)
    except UnicodeDecodeError as error:
        built = [RawDocument(place.name, [], f"not UTF-8 at byte {error.start}")]
    except UnicodeEncodeError:
        built = [RawDocument(place.name, [], "half of a surrogate pair is no text")]
    except RecursionError:
        built = [RawDocument(place.name, [], "nested too deep")]
    except KeyError as error:
        built = [RawDocument(place.name, [], f"no key {str(error)[:100]}")]
    except json.JSONDecodeError as error:
        built = [RawDocument(place.name, [], f"not JSON: {error.msg} at character {error.pos}")]
    except (DataError, ValueError, TypeError) as error:
        text = str(error) if type(error) in (DataError, ValueError) else said(error)
        built = [RawDocument(place.name, [], text.encode("utf-8", "backslashreplace").decode()[:400])]
    yield from built


def mapping_of(record: Any, keys: str) -> dict[str, Any]:
    """A record as a mapping; raises ValueError naming the `keys` it should have."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a mapping with {keys}")
    return record


def caption_of(record: dict[str, Any], reading: Reading) -> str | None:
    """The text of a record, under the key that the source names or the first of the usual ones; None where absent."""
    keys = (reading.text_key,) if reading.text_key is not None else TEXT_KEYS
    for key in keys:
        if record.get(key) is not None:
            return text_of(record[key], key)
    return None


def medium(kind: str, reference: Any, place: Place) -> RawSegment:
    """A medium that a record names by path, by URL or as a data: URL; raises ValueError or DataError for any other."""
    name = text_of(reference, kind)
    if "\0" in name:
        raise ValueError(f"{kind} has a name with a NUL byte")
    return RawSegment(kind, _content(name, f"{place.name}:{kind}", place), is_target=False)


def _content(name: str, own_name: str, place: Place) -> Media | RemoteMedia:
    if name[:5].lower() == "data:":
        head, _, data = name.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data: URL is read in base64 alone")
        return decoded(data, own_name)
    beside = local_path(place.file)
    path = local_path(name)
    if path is None:
        refuse_protocol(name)
        return RemoteMedia(name, name)
    if beside is not None:
        return Media(name, beside.parent / path)
    if path.is_absolute():
        raise ValueError(f"a document of {protocol_of(place.file)}:// names the local file {name[:200]}")
    scheme, _, folder = place.file.rpartition("/")[0].partition("://")
    joined = posixpath.normpath(posixpath.join("/", folder, name)).lstrip("/")
    if joined.split("/")[0] != folder.lstrip("/").split("/")[0]:
        raise ValueError(f"{name[:200]} lies outside of {place.file}'s bucket")
    slashes = ":///" if folder.startswith("/") else "://"
    return RemoteMedia(name, f"{scheme}{slashes}{joined}")


def decoded(data: str, name: str) -> Media:
    """A medium given in base64; raises ValueError where it is not."""
    try:
        return Media(name, base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error


def beside(file: str, name: str) -> str:
    """The path or URL of `name` in the folder of `file`."""
    path = local_path(file)
    return f"{file.rpartition('/')[0]}/{name}" if path is None else str(Path(file).parent / name)


def text_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """A line of a jsonl source: its text is the document, all of it a target."""
    wanted = reading.text_key or " or ".join(TEXT_KEYS[:2])
    text = caption_of(mapping_of(record, wanted), reading)
    if text is None:
        raise ValueError(f"no {wanted}; its keys: {', '.join(map(str, list(record)[:8]))}: set text_key of the source")
    return [RawDocument(place.name, [RawSegment("text", text, is_target=True)])]


def table_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """A row of a Parquet file: its media, by bytes or path, then its text, a target."""
    segments = []
    for kind in ("image", "audio", "video"):
        key = getattr(reading, f"{kind}_key")
        if record.get(key) is not None:
            segments.append(_cell(kind, key, record[key], place))
    text = caption_of(record, reading)
    if text is None:
        raise ValueError("no caption" if segments else "the row is empty")
    return [RawDocument(place.name, [*segments, RawSegment("text", text, is_target=True)])]


def _cell(kind: str, key: str, value: Any, place: Place) -> RawSegment:
    """A medium as Hugging Face stores it: a struct of bytes and path, the path alone, or the bytes alone."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else path
        if value is None:
            raise ValueError(f"{key} has neither bytes nor path")
    if isinstance(value, bytes):
        return RawSegment(kind, Media(f"{place.name}:{kind}", value), is_target=False)
    return medium(kind, value, place)
