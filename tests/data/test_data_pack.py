"""Whole documents into rows: nothing is lost, doubled or cut that must not be."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import pytest
from handmade import build
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data.loader import Rows
from omniloom.data.pack import OPEN_ROWS, SHUFFLED_ROWS, Piece, count_unusable, cut, heldout_rows, pack, training_rows
from omniloom.errors import ConfigError, DataError

quiet = settings(max_examples=60, deadline=None)
SEQ_LEN = 16
ALIKE = [(0, np.ones(1))]  # one phase, one source
lengths = st.lists(st.integers(1, SEQ_LEN) | st.integers(9, SEQ_LEN), max_size=90)


@dataclass
class Split:
    """What packing looks at of a CorpusSplit."""

    tokens: np.ndarray
    has_media: np.ndarray
    source: np.ndarray

    def __post_init__(self) -> None:
        self.has_media = np.asarray(self.has_media, bool)

    def __len__(self) -> int:
        return len(self.tokens)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Documents short and long, with and without media, of up to three sources; the first of each source fits."""
    sources = draw(st.integers(1, 3))
    extra = draw(st.lists(st.tuples(st.integers(2, 60), st.booleans(), st.integers(0, sources - 1)), max_size=30))
    documents = [(draw(st.integers(2, SEQ_LEN)), False, source) for source in range(sources)] + extra
    tokens, media, source = (np.array(column) for column in zip(*documents, strict=True))
    return Split(tokens, media, source)


def pieces_of(tokens: list[int]) -> list[Piece]:
    return [Piece(number, 0, length) for number, length in enumerate(tokens)]


def filled_rows(pieces: list[Piece]) -> list[list[Piece]]:
    """The rows that `pack` gives before it has seen that there is no more."""
    ended = False

    def feed() -> Iterator[Piece]:
        nonlocal ended
        yield from pieces
        ended = True

    rows = []
    for row in pack(feed(), SEQ_LEN):
        if ended:
            break
        rows.append(list(row))
    return rows


Phases = list[tuple[int, np.ndarray]]


def weights_of(split: Split) -> np.ndarray:
    return np.ones(split.source.max() + 1)


def equal_weights(split: Split) -> Phases:
    return [(0, weights_of(split))]


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
    longer = list(pack(pieces_of(tokens + more), SEQ_LEN))
    assert longer[: len(given_rows)] == given_rows
    shorter = list(pack(pieces_of(tokens), SEQ_LEN))
    assert shorter[: len(given_rows)] == given_rows
    assert len(shorter) - len(given_rows) <= OPEN_ROWS


def test_best_fit_by_hand() -> None:
    # 10 and 13 open a row each; 3 fits the second exactly, which comes out first; 4 goes to the first, 5 opens a third.
    rows = list(pack(pieces_of([10, 13, 3, 4, 5]), SEQ_LEN))
    assert [[piece.document for piece in row] for row in rows] == [[1, 2], [0, 3], [4]]


def test_the_fullest_open_row_leaves_when_there_are_too_many() -> None:
    tokens = [9] * (OPEN_ROWS - 1) + [12, 10]
    rows = list(pack(pieces_of(tokens), SEQ_LEN))
    assert [piece.document for piece in rows[0]] == [OPEN_ROWS - 1]
    assert len(rows) == OPEN_ROWS + 1


def test_packing_short_documents_wastes_little() -> None:
    generator = np.random.default_rng(0)
    pieces = pieces_of(generator.integers(2, 40, 3_000).tolist())
    rows = list(pack(pieces, 64))
    assert sum(piece.tokens for piece in pieces) / (64 * len(rows)) > 0.97


@quiet
@given(st.integers(2, 200), st.integers(2, 40))
def test_each_token_of_a_long_text_is_a_target_once(tokens: int, seq_len: int) -> None:
    """The first token of a window is no target there: nothing of its document stands before it."""
    pieces = cut(7, tokens, False, seq_len)
    assert all(2 <= piece.tokens <= seq_len and piece.document == 7 for piece in pieces)
    targets = [token for piece in pieces for token in range(piece.start + 1, piece.stop)]
    assert targets == list(range(1, tokens))
    assert all(left.stop - 1 == right.start for left, right in pairwise(pieces))


@given(st.integers(2, 100), st.integers(2, 40))
@quiet
def test_a_document_with_media_is_never_cut(tokens: int, seq_len: int) -> None:
    assert cut(0, tokens, True, seq_len) == ([Piece(0, 0, tokens)] if tokens <= seq_len else [])


@quiet
@given(splits(), st.integers(0, 3), st.integers(1, 30), st.integers(0, 30))
def test_a_longer_run_begins_with_the_rows_of_the_shorter(split: Split, seed: int, rows: int, more: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omniloom.data.pack.SHUFFLED_ROWS", 8)  # so that a run ends within a block or after several
        shorter = training_rows(split, equal_weights(split), seed, SEQ_LEN, rows)
        longer = training_rows(split, equal_weights(split), seed, SEQ_LEN, rows + more)
    assert len(shorter) == rows
    assert longer[:rows] == shorter


@quiet
@given(splits())
def test_training_rows_hold_what_fits_and_never_part_of_a_picture(split: Split) -> None:
    rows = training_rows(split, equal_weights(split), 0, SEQ_LEN, 60)
    too_long = (split.tokens > SEQ_LEN) & (split.has_media)
    for row in rows:
        assert 0 < sum(piece.tokens for piece in row) <= SEQ_LEN
        for piece in row:
            assert not too_long[piece.document]
            if split.has_media[piece.document]:
                assert (piece.start, piece.stop) == (0, split.tokens[piece.document])
    assert count_unusable(split, SEQ_LEN) == sum(too_long)


def test_rows_are_shuffled_in_blocks_each_in_its_own_order() -> None:
    """A long text fills many rows in a row; training must not see them one after another."""
    windows = 2 * SHUFFLED_ROWS
    split = Split(np.array([windows * (SEQ_LEN - 1) + 1]), np.zeros(1, int), np.zeros(1, int))
    rows = training_rows(split, ALIKE, 0, SEQ_LEN, windows)
    starts = [row[0].start // (SEQ_LEN - 1) for row in rows]
    first, second = starts[:SHUFFLED_ROWS], starts[SHUFFLED_ROWS:]
    assert sorted(first) == list(range(SHUFFLED_ROWS))
    assert sorted(second) == list(range(SHUFFLED_ROWS, windows))
    assert first != sorted(first)
    assert [start + SHUFFLED_ROWS for start in first] != second
    other = training_rows(split, ALIKE, 1, SEQ_LEN, SHUFFLED_ROWS)
    assert other != rows[:SHUFFLED_ROWS]


def test_another_seed_gives_another_stream() -> None:
    split = Split(np.full(30, 8), np.zeros(30, int), np.zeros(30, int))
    first, second, again = (training_rows(split, ALIKE, seed, SEQ_LEN, 10) for seed in (0, 1, 0))
    assert first == again
    assert first != second


def test_one_epoch_of_rows_holds_each_document_once() -> None:
    """Rows are shuffled in blocks: with two documents a row, a block is one epoch of as many documents twice."""
    documents = 2 * SHUFFLED_ROWS
    split = Split(np.full(documents, 8), np.zeros(documents, int), np.zeros(documents, int))
    rows = training_rows(split, ALIKE, 0, SEQ_LEN, 2 * SHUFFLED_ROWS)
    for epoch in (rows[:SHUFFLED_ROWS], rows[SHUFFLED_ROWS:]):
        assert sorted(piece.document for row in epoch for piece in row) == list(range(documents))


def test_shares_of_the_packed_tokens_come_to_the_weights() -> None:
    generator = np.random.default_rng(0)
    tokens = np.concatenate([generator.integers(2, 12, 50), generator.integers(5, 50, 20)])
    media = np.concatenate([np.full(50, 1), np.zeros(20, int)])
    split = Split(tokens, media, np.repeat([0, 1], [50, 20]))
    rows = training_rows(split, [(0, np.array([0.2, 0.8]))], 0, SEQ_LEN, 2_000)
    count: Counter[int] = Counter()
    for row in rows:
        for piece in row:
            count[int(split.source[piece.document])] += piece.tokens
    assert count[0] / count.total() == pytest.approx(0.2, abs=0.02)


def test_no_usable_document_is_refused_with_both_lengths() -> None:
    split = Split(np.array([20, 30]), np.array([4, 4]), np.zeros(2, int))
    with pytest.raises(DataError, match=r"data.seq_len=16.*20 tokens"):
        training_rows(split, ALIKE, 0, SEQ_LEN, 1)
    nothing = np.zeros(0, int)
    with pytest.raises(DataError, match="no document in this split"):
        training_rows(Split(nothing, nothing, nothing), ALIKE, 0, SEQ_LEN, 1)


@quiet
@given(splits(), st.integers(1, 12))
def test_heldout_rows_hold_each_source_and_no_token_twice(split: Split, rows: int) -> None:
    plan = heldout_rows(split, SEQ_LEN, rows)
    pieces = [piece for row in plan for piece in row]
    assert {int(split.source[piece.document]) for piece in pieces} == set(split.source.tolist())
    targets = [(piece.document, token) for piece in pieces for token in range(piece.start + 1, piece.stop)]
    assert len(set(targets)) == len(targets)
    assert all(sum(piece.tokens for piece in row) <= SEQ_LEN for row in plan)
    assert plan == heldout_rows(split, SEQ_LEN, rows)


def test_heldout_rows_share_their_tokens_equally_between_sources() -> None:
    split = Split(np.full(200, 8), np.zeros(200, int), np.repeat([0, 1], [150, 50]))
    plan = heldout_rows(split, SEQ_LEN, 10)
    count = Counter(int(split.source[piece.document]) for row in plan for piece in row)
    assert count == {0: 10, 1: 10}
    assert len(plan) == 10


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of one long text, in the order of its windows."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "a.txt").write_text(" ".join(str(number) for number in range(60)))
    (folder / "corpus.yaml").write_text("sources: {words: {format: text, train: [a.txt]}}")
    split = build(folder / "corpus.yaml", folder / "corpus").split("train")
    pieces = cut(0, int(split.tokens[0]), False, SEQ_LEN)
    return Rows(split, list(pack(pieces, SEQ_LEN)), SEQ_LEN)


def test_the_targets_of_a_long_text_come_to_the_whole_text(long_text: Rows) -> None:
    """Every token but bos is learned once, over the windows of real rows."""
    split = long_text._split
    assert len(long_text) > 5
    targets: list[int] = []
    windows = []
    for row in (long_text[index] for index in range(len(long_text))):
        for number in range(row.document.max() + 1):
            windows.append(row.input_ids[row.document == number].tolist())
    starts = {piece.start: ids for piece, ids in zip(_all_pieces(long_text), windows, strict=True)}
    for start in sorted(starts):
        targets += starts[start][1:]
    assert targets == split.document(0).input_ids.tolist()[1:]


def _all_pieces(rows: Rows) -> list[Piece]:
    return [piece for row in rows._plan for piece in row]


def test_the_stream_never_ends() -> None:
    split = Split(np.array([SEQ_LEN]), np.array([0]), np.array([0]))
    assert list(islice(training_rows(split, ALIKE, 0, SEQ_LEN, 50), 49, 50)) == [[Piece(0, 0, SEQ_LEN)]]


@st.composite
def phased(draw: st.DrawFn) -> tuple[Split, Phases]:
    """Documents with the phases of a run; every phase gives each source some weight or none, never none to all."""
    split = draw(splits())
    starts = sorted(draw(st.sets(st.integers(1, 40), max_size=3)))
    weight = st.lists(
        st.sampled_from([0.0, 0.2, 1.0]), min_size=len(weights_of(split)), max_size=len(weights_of(split))
    )
    return split, [(start, np.array(draw(weight.filter(any)))) for start in (0, *starts)]


def sources_by_row(split: Split, rows: list[list[Piece]]) -> list[set[int]]:
    return [{int(split.source[piece.document]) for piece in row} for row in rows]


@quiet
@given(phased(), st.integers(0, 3), st.integers(1, 60), st.integers(0, 60))
def test_more_rows_never_change_the_earlier_ones_whatever_the_phases(
    stream: tuple[Split, Phases], seed: int, rows: int, more: int
) -> None:
    split, phases = stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omniloom.data.pack.SHUFFLED_ROWS", 8)
        shorter, longer = (training_rows(split, phases, seed, SEQ_LEN, count) for count in (rows, rows + more))
    assert len(shorter) == rows
    assert longer[:rows] == shorter


@pytest.mark.parametrize("starts", [(300,), (1,), (256, 512), (5, 261, 262, 900)])
def test_the_weights_switch_at_exactly_the_declared_row(starts: tuple[int, ...]) -> None:
    """Each document fills a row of its own, so nothing waits in an open row."""
    split = Split(np.full(40, SEQ_LEN), np.zeros(40), np.repeat([0, 1], 20))
    phases = [(start, np.eye(2)[number % 2]) for number, start in enumerate((0, *starts))]
    sources = sources_by_row(split, training_rows(split, phases, 0, SEQ_LEN, 1_000))
    expected = [{sum(row >= start for start in starts) % 2} for row in range(1_000)]
    assert sources == expected


def test_only_pieces_that_lay_in_open_rows_come_into_the_next_phase() -> None:
    """Documents of half a row and more: at most OPEN_ROWS rows of the old weights are left when the new ones begin."""
    generator = np.random.default_rng(0)
    split = Split(generator.integers(6, SEQ_LEN, 200), np.zeros(200), np.repeat([0, 1], 100))
    phases = [(0, np.array([1.0, 0.0])), (300, np.array([0.0, 1.0]))]
    sources = sources_by_row(split, training_rows(split, phases, 0, SEQ_LEN, 900))
    assert all(seen == {0} for seen in sources[:300])
    assert 0 < sum(0 in seen for seen in sources[300:]) <= OPEN_ROWS
    assert any(0 in seen for seen in sources[300 : 300 + SHUFFLED_ROWS])
    assert all(seen == {1} for seen in sources[300 + SHUFFLED_ROWS :])


def test_shares_of_tokens_come_to_the_weights_within_each_phase() -> None:
    generator = np.random.default_rng(0)
    split = Split(generator.integers(2, 12, 90), np.zeros(90), np.repeat([0, 1, 2], 30))
    shares = [(0.7, 0.3, 0.0), (0.1, 0.1, 0.8), (0.5, 0.5, 0.0)]
    phases = [(700 * number, 5 * np.array(share)) for number, share in enumerate(shares)]
    rows = training_rows(split, phases, 0, SEQ_LEN, 2_100)
    for (start, _), share in zip(phases, shares, strict=True):
        count = np.zeros(3)
        for row in rows[start : start + 700]:
            for piece in row:
                count[split.source[piece.document]] += piece.tokens
        np.testing.assert_allclose(count / count.sum(), share, atol=0.04)  # open rows carry over


def test_an_epoch_goes_on_over_a_change_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document comes again before all of its source have come, phases or not."""
    split = Split(np.full(60, SEQ_LEN), np.zeros(60), np.repeat([0, 1], 30))
    phases = [(0, np.array([1.0, 0.0])), (10, np.array([0.0, 1.0])), (25, np.array([1.0, 0.0]))]
    monkeypatch.setattr("omniloom.data.pack.SHUFFLED_ROWS", 5)
    rows = training_rows(split, phases, 0, SEQ_LEN, 45)
    documents = [row[0].document for row in rows]
    first_source = [number for number in documents if number < 30]
    assert sorted(first_source) == list(range(30))
    assert len(set(documents)) == len(documents)


def test_a_phase_without_a_document_to_give_is_refused() -> None:
    split = Split(np.full(4, 8), np.zeros(4), np.zeros(4, int))
    with pytest.raises(ConfigError, match=r"set data\.weights"):
        training_rows(split, [(0, np.array([1.0, 1.0])), (5, np.array([0.0, 1.0]))], 0, SEQ_LEN, 10)
