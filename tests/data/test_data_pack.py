"""Whole documents into rows: nothing is lost, doubled or cut that must not be."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import media_document

from omniloom.data.pack import OPEN_ROWS, Packer, Piece, cut, pack, windows
from omniloom.modality.sequence import AUDIO, Document

quiet = settings(max_examples=80, deadline=None)
SEQ_LEN = 16
lengths = st.lists(st.integers(1, SEQ_LEN) | st.integers(9, SEQ_LEN), max_size=90)
runs = st.lists(
    st.tuples(st.just(0), st.integers(1, 40))
    | st.tuples(st.sampled_from([1, 2]), st.integers(1, 12))
    | st.tuples(st.just(3), st.integers(1, 15).map(lambda frames: 2 * frames)),
    min_size=1,
    max_size=8,
)


def pieces_of(tokens: list[int]) -> list[Piece]:
    return [Piece(number, 0, length) for number, length in enumerate(tokens)]


def filled_rows(pieces: list[Piece]) -> list[list[Piece]]:
    """The rows that come out while pieces go in."""
    packer = Packer(SEQ_LEN)
    return [row for piece in pieces if (row := packer.add(piece)) is not None]


@quiet
@given(lengths)
def test_every_piece_lies_in_one_row_that_holds_it(tokens: list[int]) -> None:
    rows = list(pack(pieces_of(tokens), SEQ_LEN))
    assert all(0 < sum(piece.tokens for piece in row) <= SEQ_LEN for row in rows)
    assert sorted(piece for row in rows for piece in row) == pieces_of(tokens)


@quiet
@given(lengths, lengths)
def test_more_pieces_never_change_the_rows_already_given(tokens: list[int], more: list[int]) -> None:
    given_rows = filled_rows(pieces_of(tokens))
    assert list(pack(pieces_of(tokens + more), SEQ_LEN))[: len(given_rows)] == given_rows
    assert len(list(pack(pieces_of(tokens), SEQ_LEN))) - len(given_rows) <= OPEN_ROWS


@quiet
@given(st.lists(st.integers(1, SEQ_LEN), max_size=OPEN_ROWS))
def test_each_piece_goes_where_it_leaves_least_room(tokens: list[int]) -> None:
    """The same rows as a search through all open ones, the oldest of equals."""
    open_rows: list[list[Piece]] = []
    expected: list[list[Piece]] = []

    def room(row: list[Piece]) -> int:
        return SEQ_LEN - sum(piece.tokens for piece in row)

    for piece in pieces_of(tokens):  # fewer than OPEN_ROWS wait
        fitting = [row for row in open_rows if room(row) >= piece.tokens]
        row = min(fitting, key=room, default=None)
        if row is None:
            row = []
            open_rows.append(row)
        row.append(piece)
        if room(row) == 0:
            open_rows.remove(row)
            expected.append(row)
    assert list(pack(pieces_of(tokens), SEQ_LEN)) == expected + open_rows


def test_best_fit_by_hand() -> None:
    # 10 and 13 open a row each; 3 fits the second exactly, which comes out first; 4 goes to the first, 5 opens a third.
    rows = list(pack(pieces_of([10, 13, 3, 4, 5]), SEQ_LEN))
    assert [[piece.document for piece in row] for row in rows] == [[1, 2], [0, 3], [4]]


def test_the_oldest_open_row_leaves_when_there_are_too_many() -> None:
    """So a piece that nothing fits beside comes out in the end."""
    tokens = [9] * (OPEN_ROWS - 1) + [12, 10]
    rows = list(pack(pieces_of(tokens), SEQ_LEN))
    assert [piece.document for piece in rows[0]] == [0]
    assert len(rows) == OPEN_ROWS + 1


@pytest.mark.parametrize("seq_len", [1_024, 4_096])
def test_a_long_tailed_mix_fills_97_percent(seq_len: int) -> None:
    """Log-normal lengths as of web pages, chats of a few hundred tokens, pictures of one size with a caption."""
    generator = np.random.default_rng(0)
    pages = generator.lognormal(6.3, 1.2, 6_000).astype(int) + 2
    chats = generator.integers(40, 500, 3_000)
    pictures = 258 + generator.integers(5, 40, 3_000)
    tokens = generator.permutation(np.concatenate([pages, chats, pictures])).tolist()
    pieces = [piece for number, count in enumerate(tokens) for piece in windows(Piece(number, 0, count), seq_len)]
    rows = filled_rows_of(pieces, seq_len)
    assert sum(piece.tokens for row in rows for piece in row) / (seq_len * len(rows)) >= 0.97


def filled_rows_of(pieces: list[Piece], seq_len: int) -> list[list[Piece]]:
    packer = Packer(seq_len)
    return [row for piece in pieces if (row := packer.add(piece)) is not None]


@quiet
@given(st.integers(2, 200), st.integers(2, 40), st.integers(0, 50))
def test_each_token_of_a_long_text_is_a_target_once(tokens: int, seq_len: int, start: int) -> None:
    """The first token of a window is no target there: nothing of its document stands before it."""
    pieces = windows(Piece(7, start, start + tokens), seq_len)
    assert all(2 <= piece.tokens <= seq_len and piece.document == 7 for piece in pieces)
    targets = [token for piece in pieces for token in range(piece.start + 1, piece.stop)]
    assert targets == list(range(start + 1, start + tokens))
    assert all(left.stop - 1 == right.start for left, right in pairwise(pieces))


def may_cut(document: Document, at: int) -> bool:
    """Word by word: at an end, beside text, or where an item, a frame or a clip begins."""
    if at in (0, len(document)) or document.modality[at] == 0 or document.modality[at - 1] == 0:
        return True
    time, row, column = document.position[at].tolist()
    begins = time == 0 if document.modality[at] == AUDIO else row == column == 0
    return bool(begins or document.modality[at] != document.modality[at - 1])


@quiet
@given(runs, st.integers(12, 40), st.sampled_from(["window", "segment"]))
def test_a_document_with_media_is_cut_where_it_may_and_nowhere_else(
    parts: list[tuple[int, int]], seq_len: int, policy: str
) -> None:
    document = media_document(*parts)
    pieces = cut(Piece(3, 0, len(document)), document, seq_len, policy)
    assert pieces[0].start == 0
    assert pieces[-1].stop == len(document)
    for piece in pieces:
        assert 0 < piece.tokens <= seq_len
        assert may_cut(document, piece.start)
        assert may_cut(document, piece.stop)
        window = document.window(piece.start, piece.stop)  # raises where a clip is cut
        assert len(window.image) == (window.modality == 1).sum()
        assert window.audio_frames.sum() == len(window.audio) == 2 * (window.modality == 2).sum()
    for left, right in pairwise(pieces):
        assert left.stop > left.start
        assert right.stop > left.stop
        overlap = left.stop - right.start
        assert overlap in (0, 1)
        assert not overlap or document.modality[right.start] == 0


def is_behind_a_medium(document: Document, at: int) -> bool:
    return bool(document.modality[at] == 0 and document.modality[at - 1] != 0)


@quiet
@given(runs, st.integers(12, 40))
def test_a_window_ends_as_late_as_it_may(parts: list[tuple[int, int]], seq_len: int) -> None:
    """But not between a medium and its text, unless nothing else fits."""
    document = media_document(*parts)
    before = 0
    for piece in cut(Piece(0, 0, len(document)), document, seq_len, "window")[:-1]:
        places = [at for at in range(before + 1, piece.start + seq_len + 1) if may_cut(document, at)]
        good = [at for at in places if not is_behind_a_medium(document, at)]
        assert piece.stop == (good or places)[-1]
        before = piece.stop


@pytest.mark.parametrize("policy", ["window", "segment"])
def test_no_label_is_lost_where_pictures_and_captions_follow_one_another(policy: str) -> None:
    document = media_document(*[(1, 16), (0, 10)] * 20)
    pieces = cut(Piece(0, 0, len(document)), document, 48, policy)
    assert len(pieces) > 5
    learned = [
        token for piece in pieces for token in range(piece.start + 1, piece.stop) if not document.modality[token]
    ]
    assert learned == np.flatnonzero(document.modality == 0).tolist()


def test_segments_are_kept_whole_where_they_fit() -> None:
    document = media_document((0, 5), (0, 6), (0, 7), (0, 4))
    assert cut(Piece(0, 0, 22), document, 12, "segment") == [Piece(0, 0, 11), Piece(0, 10, 22)]
    assert cut(Piece(0, 0, 22), document, 12, "window") == [Piece(0, 0, 12), Piece(0, 11, 22)]
    # A segment longer than a row is windowed.
    long = media_document((0, 30), (0, 3))
    assert cut(Piece(0, 0, 33), long, 12, "segment")[0] == Piece(0, 0, 12)


def test_the_overlap_is_given_up_where_the_next_picture_needs_the_whole_row() -> None:
    document = media_document((0, 5), (1, 12), (0, 3))
    assert cut(Piece(0, 0, 20), document, 12, "window") == [Piece(0, 0, 5), Piece(0, 5, 17), Piece(0, 17, 20)]
    assert cut(Piece(0, 0, 20), document, 13, "window") == [Piece(0, 0, 5), Piece(0, 4, 17), Piece(0, 17, 20)]


@pytest.mark.parametrize("item", [(1, 13), (2, 13)])
def test_an_item_longer_than_a_row_leaves_no_piece(item: tuple[int, int]) -> None:
    document = media_document((0, 5), item, (0, 3))
    assert cut(Piece(0, 0, len(document)), document, 12, "segment") == []


def test_a_video_longer_than_a_row_is_cut_between_frames() -> None:
    document = media_document((3, 60))
    pieces = cut(Piece(0, 0, 60), document, 13, "window")
    assert [piece.tokens for piece in pieces] == [12] * 5


def test_a_part_of_a_document_is_cut_within_its_bounds() -> None:
    document = media_document((0, 10), (1, 6), (0, 30))
    pieces = cut(Piece(0, 8, 40), document, 12, "window")
    assert (pieces[0].start, pieces[-1].stop) == (8, 40)
    assert all(piece.tokens <= 12 for piece in pieces)
