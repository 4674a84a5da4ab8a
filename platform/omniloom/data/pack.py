"""Whole documents into rows of `seq_len` tokens: which pieces lie in which row."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from omniloom.data.mixture import DocumentOrder
from omniloom.data.shards import CorpusSplit
from omniloom.errors import DataError

OPEN_ROWS = 32  # rows that wait for a document that fits; more packs tighter
SHUFFLED_ROWS = 256  # rows are shuffled in blocks of this size: a long document fills many in a row


class Piece(NamedTuple):
    """The tokens from `start` to `stop` of one document."""

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens it takes of a row."""
        return self.stop - self.start


@dataclass
class _OpenRow:
    room: int
    pieces: list[Piece] = field(default_factory=list)


def cut(document: int, tokens: int, has_media: bool, seq_len: int) -> list[Piece]:
    """A document as pieces that fit a row.

    One longer than a row is cut into windows that overlap by one token, so that each of its tokens is a target once.
    Media are never cut: a long document with media gives no piece.
    """
    if tokens <= seq_len:
        return [Piece(document, 0, tokens)]
    if has_media:
        return []
    step = seq_len - 1
    return [Piece(document, start, min(start + seq_len, tokens)) for start in range(0, tokens - 1, step)]


def pack(pieces: Iterable[Piece], seq_len: int) -> Iterator[list[Piece]]:
    """Best fit, online: a piece goes to the open row it leaves least room in; rows come out as they fill.

    Prefix-stable: more pieces never change the rows already given, so a run that is made longer sees the same
    beginning. The rows still open at the end of `pieces` come last.
    """
    open_rows: list[_OpenRow] = []
    for piece in pieces:
        fitting = [row for row in open_rows if row.room >= piece.tokens]
        row = min(fitting, key=lambda r: r.room, default=None)
        if row is None:
            if len(open_rows) == OPEN_ROWS:
                fullest = min(open_rows, key=lambda r: r.room)
                open_rows.remove(fullest)
                yield fullest.pieces
            row = _OpenRow(seq_len)
            open_rows.append(row)
        row.pieces.append(piece)
        row.room -= piece.tokens
        if row.room == 0:
            open_rows.remove(row)
            yield row.pieces
    for row in open_rows:
        yield row.pieces


def training_rows(
    split: CorpusSplit, phases: list[tuple[int, np.ndarray]], seed: int, seq_len: int, rows: int
) -> list[list[Piece]]:
    """The first `rows` rows of the endless training stream: a function of (corpus, phases, seed, seq_len).

    A phase (first row, weights) begins at exactly that row with what is packed from then on; pieces that lay in open
    rows come with it. Prefix-stable: blocks of SHUFFLED_ROWS, counted from the phase's first row, are permuted by
    (seed, their first row), whatever comes after them.
    """
    usable = _usable(split, seq_len)
    order = DocumentOrder(split.tokens[usable], split.source[usable], phases[0][1], seed)
    pieces = (
        piece
        for number in order
        for piece in cut(usable[number], split.tokens[usable[number]], bool(split.has_media[usable[number]]), seq_len)
    )
    packed = pack(pieces, seq_len)
    given: list[list[Piece]] = []
    # The last phase never ends: its last block is whole, and cut afterwards.
    ends = [first for first, _ in phases[1:]] + [rows + SHUFFLED_ROWS]
    for (first, weights), end in zip(phases, ends, strict=True):
        order.weigh(weights)
        for start in range(first, min(end, rows), SHUFFLED_ROWS):
            block = list(islice(packed, min(SHUFFLED_ROWS, end - start)))
            given += [block[i] for i in np.random.default_rng([seed, start]).permutation(len(block))]
    return given[:rows]


def heldout_rows(split: CorpusSplit, seq_len: int, rows: int) -> list[list[Piece]]:
    """About `rows` rows of held-out documents, each at most once, an equal share of the tokens to every source."""
    usable = _usable(split, seq_len)
    sources = np.unique(split.source[usable])
    budget = rows * seq_len / len(sources)
    chosen: list[Piece] = []
    for source in sources:
        left = budget
        for document in usable[split.source[usable] == source]:
            for piece in cut(int(document), split.tokens[document], split.has_media[document], seq_len):
                if left > 0:
                    chosen.append(piece)
                    left -= piece.tokens
    return list(pack(chosen, seq_len))


def _usable(split: CorpusSplit, seq_len: int) -> np.ndarray:
    fits = (split.tokens <= seq_len) | ~split.has_media
    if not fits.any():
        raise DataError(
            f"no document fits a row of data.seq_len={seq_len}: the shortest with media has {split.tokens.min()} tokens"
            if len(split)
            else "the corpus has no document in this split"
        )
    return np.flatnonzero(fits)


def count_unusable(split: CorpusSplit, seq_len: int) -> int:
    """Documents with media that are longer than a row and so never trained on."""
    return int(((split.tokens > seq_len) & split.has_media).sum())
