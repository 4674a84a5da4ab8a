"""Raw documents become documents: their texts are encoded many at a time while a child decodes their media."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from cachetools import LRUCache

from omniloom.data.decode import Decoders
from omniloom.data.source import RawDocument, RemoteMedia
from omniloom.data.storage import fetch, size_bytes
from omniloom.errors import DataError
from omniloom.modality.files import Media
from omniloom.modality.sequence import Document, Segment, weave
from omniloom.modality.text import TextTokenizer, text_segment

# Two windows are held at once: one that is woven, one whose media are being decoded.
WINDOW_DOCUMENTS, WINDOW_TEXT_BYTES = 256, 1 << 20
WINDOW_MEDIA, WINDOW_MEDIA_BYTES = 16, 64 << 20
MEDIA_KEPT_BYTES = 64 << 20

Medium = tuple[str, Media | RemoteMedia]
Begun = tuple[RawDocument, list[Segment | Medium | DataError]]


class Weaver:
    """Weaves the documents of one corpus; a medium shown again is decoded once, as long as it is kept."""

    def __init__(self, tokenizer: TextTokenizer, decoders: Decoders) -> None:
        self._tokenizer, self._decoders, self._modality = tokenizer, decoders, decoders.config
        self._underway: dict[Medium, Future[list[Segment]]] = {}
        self._kept: LRUCache[Medium, list[Segment] | DataError] = LRUCache(MEDIA_KEPT_BYTES, getsizeof=_kept_bytes)

    def weave(self, raws: Iterable[RawDocument]) -> Iterator[tuple[RawDocument, Document | DataError]]:
        """Each raw document, in order, with its document or the reason why it cannot be used."""
        before: list[Begun] = []
        for window in _windows(raws):
            begun = self._begin(window)
            yield from self._finish(before)
            before = begun
        yield from self._finish(before)

    def _begin(self, raws: list[RawDocument]) -> list[Begun]:
        """Encode the texts of a window and have its media decoded."""
        texts = [part.content for raw in raws for part in raw.segments if isinstance(part.content, str)]
        ids = iter(self._tokenizer.encode_batch(texts))
        begun: list[Begun] = []
        for raw in raws:
            parts: list[Segment | Medium | DataError] = [DataError(raw.problem)] if raw.problem is not None else []
            for part in raw.segments:
                if isinstance(part.content, str):
                    parts.append(text_segment(next(ids), part.is_target))
                    continue
                try:
                    parts.append(self._submit(part.kind, part.content))
                except DataError as error:
                    parts.append(error)
            begun.append((raw, parts))
        return begun

    def _submit(self, kind: str, content: Media | RemoteMedia) -> Medium:
        medium = (kind, content)
        if medium not in self._kept and medium not in self._underway:
            self._underway[medium] = self._decode(medium)
        return medium

    def _decode(self, medium: Medium) -> Future[list[Segment]]:
        """Have a medium decoded; one of a store is fetched first, its local file removed once that is done."""
        kind, content = medium
        if not isinstance(content, RemoteMedia):
            return self._decoders.submit(kind, content)
        limit = getattr(self._modality, kind).limit_bytes
        _, _, spool = self._decoders.settings
        local = fetch(content, limit, f"modality.{kind}.limit_bytes", spool)
        future = self._decoders.submit(kind, local)
        if isinstance(path := local.content, Path):
            future.add_done_callback(lambda _: path.unlink(missing_ok=True))  # cancelled or failed too
        return future

    def _finish(self, begun: list[Begun]) -> Iterator[tuple[RawDocument, Document | DataError]]:
        for raw, parts in begun:
            segments: list[Segment] = []
            problems: list[DataError] = []
            for part in parts:  # all of them, also behind a problem: no result stays behind
                outcome = self._decoded(part) if isinstance(part, tuple) else part
                if isinstance(outcome, DataError):
                    problems.append(outcome)
                else:
                    segments += [outcome] if isinstance(outcome, Segment) else outcome
            tokenizer, widths = self._tokenizer, self._modality.widths
            yield (
                raw,
                problems[0]
                if problems
                else weave(segments, tokenizer.bos_id, tokenizer.eos_id, tokenizer.placeholder_ids, widths),
            )

    def _decoded(self, medium: Medium) -> list[Segment] | DataError:
        """A medium's segments, or why it has none: that is kept, too, as it may have taken long to find out."""
        if medium in self._kept:
            return self._kept[medium]
        # It may have been kept when its document was begun, and crowded out since.
        outcome: list[Segment] | DataError
        try:
            outcome = (self._underway.pop(medium, None) or self._decode(medium)).result()
        except DataError as error:
            outcome = error
        if _kept_bytes(outcome) <= MEDIA_KEPT_BYTES:
            self._kept[medium] = outcome
        return outcome


def _windows(raws: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Documents as many together as a window may hold."""
    window: list[RawDocument] = []
    text_bytes = media = media_bytes = 0
    for raw in raws:
        window.append(raw)
        for part in raw.segments:
            if isinstance(part.content, str):
                text_bytes += len(part.content)
            else:
                media += 1
                media_bytes += size_bytes(part.content)
        if (
            len(window) >= WINDOW_DOCUMENTS
            or text_bytes >= WINDOW_TEXT_BYTES
            or media >= WINDOW_MEDIA
            or media_bytes >= WINDOW_MEDIA_BYTES
        ):
            yield window
            window, text_bytes, media, media_bytes = [], 0, 0, 0
    if window:
        yield window


def _kept_bytes(outcome: list[Segment] | DataError) -> int:
    return 1_000 if isinstance(outcome, DataError) else sum(segment.content.nbytes for segment in outcome)
