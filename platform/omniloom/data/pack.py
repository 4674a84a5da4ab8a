"""Whole documents into rows of `seq_len` tokens: which pieces lie in which row."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from omniloom.modality.sequence import AUDIO, TEXT, Document

OPEN_ROWS = 64  # rows that wait for a document that fits: more hardly pack tighter, and delay what a phase declares
PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("stop", "<i4")])


class Piece(NamedTuple):
    """The tokens from `start` to `stop` of one document."""

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens it takes of a row."""
        return self.stop - self.start


def windows(whole: Piece, seq_len: int) -> list[Piece]:
    """A long text as pieces that overlap by one token, so that each of its tokens is a target once."""
    starts = range(whole.start, whole.stop - 1, seq_len - 1)
    return [Piece(whole.document, start, min(start + seq_len, whole.stop)) for start in starts]


def cut(whole: Piece, document: Document, seq_len: int, policy: str) -> list[Piece]:
    """A long document as pieces, none of which begins or ends inside a picture, a frame or a clip.

    `window` cuts as late as it may, `segment` where the last segment that fits ends, or as `window` where none does;
    neither between a medium and the text behind it, unless there is no other place: that text's first token would be
    a target that nothing predicts. A piece begins with the last token of the one before where that is text and the
    next item fits beside it, as the windows of a text do. A document with an item longer than a row gives no piece.
    """
    may_begin = _may_begin(document)
    tells = (document.modality[1:] == TEXT) & (document.modality[:-1] != TEXT)  # text right behind a medium
    good = may_begin & ~np.append(False, tells)
    any_place, good_place = (np.append(np.flatnonzero(begins), len(document)) for begins in (may_begin, good))
    segment = document.segment_starts[good[document.segment_starts]]
    wanted = (segment, good_place, any_place) if policy == "segment" else (good_place, any_place)
    pieces: list[Piece] = []
    begin = cut_at = whole.start
    while cut_at < whole.stop:
        upto = min(begin + seq_len, whole.stop)
        found = (_last_between(places, cut_at, upto) for places in wanted)
        stop = whole.stop if upto == whole.stop else next((place for place in found if place is not None), None)
        if stop is None and begin < cut_at:
            begin = cut_at
            continue
        if stop is None:
            return []
        pieces.append(Piece(whole.document, begin, stop))
        cut_at = stop
        begin = stop - 1 if document.modality[stop - 1] == TEXT else stop
    return pieces


def _may_begin(document: Document) -> np.ndarray:
    """Whether a piece may begin at each token: any of text, the first of a picture, of a frame, of a clip."""
    time, row, column = document.position.T
    first = np.where(document.modality == AUDIO, time == 0, (row == 0) & (column == 0))
    return (document.modality == TEXT) | first


def _last_between(places: np.ndarray, after: int, upto: int) -> int | None:
    number = int(np.searchsorted(places, upto, side="right")) - 1
    return int(places[number]) if number >= 0 and places[number] > after else None


class Packer:
    """Best fit, online: a piece goes to the open row it leaves least room in, the oldest of equals.

    Where none has room and too many are open, the oldest comes out: no piece waits for ever. Prefix-stable: more pieces
    never change the rows already given, so a run that is made longer sees the same beginning.
    """

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._rooms: list[tuple[int, int]] = []  # (room, number) of the open rows, sorted
        self._open: dict[int, tuple[int, list[Piece]]] = {}  # by number, the oldest first: room and pieces
        self._opened = 0

    def add(self, piece: Piece) -> list[Piece] | None:
        """Place a piece; gives the row that comes out, if one does."""
        if piece.tokens == self.seq_len:
            return [piece]
        at = bisect_left(self._rooms, (piece.tokens, -1))
        if at < len(self._rooms):
            room, number = self._rooms.pop(at)
            pieces = self._open[number][1]
            pieces.append(piece)
            if room == piece.tokens:
                return self._open.pop(number)[1]
            self._keep(number, room - piece.tokens, pieces)
            return None
        leaving = self._oldest() if len(self._open) == OPEN_ROWS else None
        self._keep(self._opened, self.seq_len - piece.tokens, [piece])
        self._opened += 1
        return leaving

    def _keep(self, number: int, room: int, pieces: list[Piece]) -> None:
        insort(self._rooms, (room, number))
        self._open[number] = room, pieces

    def _oldest(self) -> list[Piece]:
        number, (room, pieces) = next(iter(self._open.items()))
        del self._open[number]
        self._rooms.pop(bisect_left(self._rooms, (room, number)))
        return pieces

    def flush(self) -> list[list[Piece]]:
        """The rows still open, the oldest first."""
        rows = [pieces for _, pieces in self._open.values()]
        self._rooms, self._open = [], {}
        return rows


def pack(pieces: Iterable[Piece], seq_len: int) -> Iterator[list[Piece]]:
    """Pieces as rows; those still open when the pieces have ended come last."""
    packer = Packer(seq_len)
    for piece in pieces:
        if (row := packer.add(piece)) is not None:
            yield row
    yield from packer.flush()
