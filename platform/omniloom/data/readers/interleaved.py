"""An interleaved line: {"segments": [{"text": …}, {"image": path}, …]}, each segment a target or not."""

from typing import Any

from omniloom.data.config import Reading
from omniloom.data.readers.record import Place, medium
from omniloom.data.source import RawDocument, RawSegment
from omniloom.errors import did_you_mean
from omniloom.modality.dialogue import text_of
from omniloom.modality.sequence import MODALITIES

SEGMENT_KEYS = (*MODALITIES, "loss")
FORM = 'not {"segments": [{"text": …}, {"image": …}, …]}'


def interleaved_document(record: Any, place: Place, reading: Reading) -> list[RawDocument]:
    """The segments of a line in order; text is a target unless it says `"loss": false`."""
    entries = record.get("segments") if isinstance(record, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{FORM}: no list of segments, or an empty one")
    return [RawDocument(place.name, [_segment(entry, place) for entry in entries])]


def _segment(entry: Any, place: Place) -> RawSegment:
    if not isinstance(entry, dict):
        raise ValueError(f"{FORM}: a segment is a mapping")
    unknown = [key for key in entry if key not in SEGMENT_KEYS]
    if unknown:
        raise ValueError(f"{FORM}: unknown key {unknown[0][:50]}; {did_you_mean(unknown[0][:50], SEGMENT_KEYS)}")
    kinds = [key for key in MODALITIES if key in entry]
    if len(kinds) != 1:
        raise ValueError(f"{FORM}: a segment is one of {', '.join(MODALITIES)}")
    kind, content = kinds[0], entry[kinds[0]]
    is_target = entry.get("loss", kind == "text")
    if not isinstance(is_target, bool):
        raise ValueError(f"{FORM}: loss must be true or false")
    if kind == "text":
        return RawSegment(kind, text_of(content, kind, may_be_empty=True), is_target)
    if is_target:
        raise ValueError(f"{FORM}: {kind} cannot be a target")
    return medium(kind, content, place)
