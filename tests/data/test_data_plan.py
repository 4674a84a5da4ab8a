"""The training stream: exact phases, whole epochs, the same beginning whatever its length, in files that ranks map."""

import json
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import Listed, media_document

from omniloom.data import mixture
from omniloom.data import plan as plan_module
from omniloom.data.pack import Piece
from omniloom.data.plan import SHUFFLED_ROWS, Phase, Plan, Schedule, Stream, heldout_rows, open_plan, plan_key
from omniloom.errors import ConfigError, DataError

quiet = settings(max_examples=40, deadline=None)
SEQ_LEN = 16


def schedule(*phases: tuple[int, list[float]] | tuple[int, list[float], int], seed: int = 0) -> Schedule:
    """Phases as (first row, weights[, length of rows])."""
    made = [Phase(phase[0], tuple(phase[1]), phase[2] if len(phase) > 2 else SEQ_LEN) for phase in phases]
    return Schedule(tuple(made), seed, "segment")


def rows_of(documents: Listed, plan: Schedule, rows: int) -> list[list[Piece]]:
    return [row for block in Stream(documents, plan).blocks(rows) for row in block]


def alike(documents: Listed, seed: int = 0) -> Schedule:
    return schedule((0, [1.0] * len(documents.names)), seed=seed)


@st.composite
def scheduled(draw: st.DrawFn) -> tuple[Listed, Schedule]:
    """Documents short and long of up to three sources, with phases; each phase gives some source weight."""
    sources = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(2, SEQ_LEN) | st.integers(2, 60), min_size=1, max_size=20)
    documents = Listed([draw(lengths) for _ in range(sources)])
    starts = sorted(draw(st.sets(st.integers(1, 40), max_size=3)))
    weights = st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=sources, max_size=sources).filter(any)
    lengths_of_rows = st.sampled_from([SEQ_LEN, SEQ_LEN, 5, 40])
    return documents, schedule(*((start, draw(weights), draw(lengths_of_rows)) for start in (0, *starts)))


@quiet
@given(scheduled(), st.integers(1, 60), st.integers(0, 60))
def test_a_longer_run_begins_with_the_rows_of_the_shorter(
    stream: tuple[Listed, Schedule], rows: int, more: int
) -> None:
    documents, plan = stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHUFFLED_ROWS", 8)  # so that a run ends within a block or after several
        shorter, longer = rows_of(documents, plan, rows), rows_of(documents, plan, rows + more)
    assert len(shorter) == rows
    assert longer[:rows] == shorter


@quiet
@given(scheduled(), st.integers(1, 100))
def test_rows_hold_no_more_than_their_length_and_nothing_empty(stream: tuple[Listed, Schedule], rows: int) -> None:
    documents, plan = stream
    for number, row in enumerate(rows_of(documents, plan, rows)):
        assert 0 < sum(piece.tokens for piece in row) <= plan.seq_len(number)
        assert all(piece.tokens > 0 for piece in row)


def targets(rows: list[list[Piece]]) -> Counter:
    return Counter(
        (piece.document, token) for row in rows for piece in row for token in range(piece.start + 1, piece.stop)
    )


@quiet
@given(scheduled())
def test_no_token_is_learned_twice_in_an_epoch(stream: tuple[Listed, Schedule]) -> None:
    """Over changes of weights and of the rows' length alike, whatever is put back and cut anew."""
    plan = stream[1]
    documents = Listed([stream[0].lengths_S[s]["tokens"].tolist() * 4_000 for s in range(len(stream[0].names))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHUFFLED_ROWS", 16)
        patch.setattr(mixture, "CHUNK_TOKENS", 256)
        made = Stream(documents, plan)
        rows = [row for block in made.blocks(50) for row in block]
    assert (made._order._drawn_S <= np.diff(documents.first_S)).all()
    assert max(targets(rows).values()) == 1
    begun = Counter(documents.source(piece.document) for row in rows for piece in row if piece.start == 0)
    counts = made.epochs_S * np.diff(documents.first_S)
    assert counts == pytest.approx([begun[source] for source in range(len(documents.names))])


def test_rows_are_shuffled_in_blocks_each_in_its_own_order() -> None:
    """A long text fills many rows in a row; training must not see them one after another."""
    windows = 2 * SHUFFLED_ROWS
    documents = Listed([[windows * (SEQ_LEN - 1) + 1]])
    rows = rows_of(documents, alike(documents), windows)
    starts = [row[0].start // (SEQ_LEN - 1) for row in rows]
    first, second = starts[:SHUFFLED_ROWS], starts[SHUFFLED_ROWS:]
    assert sorted(first) == list(range(SHUFFLED_ROWS))
    assert sorted(second) == list(range(SHUFFLED_ROWS, windows))
    assert first != sorted(first)
    assert [start + SHUFFLED_ROWS for start in first] != second
    assert rows_of(documents, alike(documents, seed=1), SHUFFLED_ROWS) != rows[:SHUFFLED_ROWS]


def test_one_epoch_of_rows_holds_each_document_once() -> None:
    """Rows are shuffled in blocks: with two documents a row, a block is one epoch of as many documents twice."""
    count = 2 * SHUFFLED_ROWS
    documents = Listed([[8] * count])
    rows = rows_of(documents, alike(documents), 2 * SHUFFLED_ROWS)
    for epoch in (rows[:SHUFFLED_ROWS], rows[SHUFFLED_ROWS:]):
        assert sorted(piece.document for row in epoch for piece in row) == list(range(count))


def sources_by_row(documents: Listed, rows: list[list[Piece]]) -> list[set[int]]:
    return [{documents.source(piece.document) for piece in row} for row in rows]


@quiet
@given(scheduled(), st.integers(1, 70), st.sampled_from([SEQ_LEN, 7]))
def test_a_phase_declared_later_changes_no_earlier_row(
    stream: tuple[Listed, Schedule], sample: int, seq_len: int
) -> None:
    """So a corpus may be appended to a run that has ended, at any sample."""
    documents, plan = stream
    earlier = [phase for phase in plan.phases if phase.first_row < sample]
    later = Phase(sample, (1.0,) * len(documents.names), seq_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHUFFLED_ROWS", 16)
        before, after = (
            rows_of(documents, replace(plan, phases=phases), sample + 20)
            for phases in (tuple(earlier), (*earlier, later))
        )
    assert after[:sample] == before[:sample]


@pytest.mark.parametrize("starts", [(300,), (1,), (256, 512), (5, 261, 262, 900)])
def test_the_weights_switch_at_exactly_the_declared_row(starts: tuple[int, ...]) -> None:
    """Whatever lay in open rows or in the rest of a block waits until its source is drawn again."""
    generator = np.random.default_rng(0)
    documents = Listed([generator.integers(2, 40, 50).tolist() for _ in range(2)])
    phases = [(start, np.eye(2)[number % 2].tolist()) for number, start in enumerate((0, *starts))]
    sources = sources_by_row(documents, rows_of(documents, schedule(*phases), 1_000))
    assert sources == [{sum(row >= start for start in starts) % 2} for row in range(1_000)]


def test_shares_of_tokens_come_to_the_weights_within_each_phase() -> None:
    generator = np.random.default_rng(0)
    documents = Listed([generator.integers(2, 12, 30).tolist() for _ in range(3)])
    shares = [(0.7, 0.3, 0.0), (0.1, 0.1, 0.8), (0.5, 0.5, 0.0)]
    phases = [(2_000 * number, [5 * part for part in share]) for number, share in enumerate(shares)]
    rows = rows_of(documents, schedule(*phases), 6_000)
    for (start, _), share in zip(phases, shares, strict=True):
        count = np.zeros(3)
        for row in rows[start : start + 2_000]:
            for piece in row:
                count[documents.source(piece.document)] += piece.tokens
        np.testing.assert_allclose(count / count.sum(), share, atol=0.01)


def test_an_epoch_goes_on_over_a_change_of_weights_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document comes again before all of its source have come, phases or not."""
    documents = Listed([[SEQ_LEN] * 30, [SEQ_LEN] * 30])
    phases = schedule((0, [1.0, 0.0]), (10, [0.0, 1.0]), (25, [1.0, 0.0]), (35, [1.0, 0.0], 2 * SEQ_LEN))
    monkeypatch.setattr(plan_module, "SHUFFLED_ROWS", 5)
    rows = rows_of(documents, phases, 40)
    drawn = [piece.document for row in rows for piece in row]
    assert sorted(number for number in drawn if number < 30) == list(range(30))
    assert len(set(drawn)) == len(drawn)


def test_rows_change_their_length_at_the_declared_row_and_lose_nothing() -> None:
    generator = np.random.default_rng(1)
    documents = Listed([generator.integers(2, 70, 2_000).tolist()])
    phases = schedule((0, [1.0], 64), (20, [1.0], 16), (90, [1.0], 128))
    rows = rows_of(documents, phases, 120)
    longest = [max(sum(piece.tokens for piece in row) for row in part) for part in (rows[:20], rows[20:90], rows[90:])]
    assert longest == [64, 16, longest[2]]
    assert 100 < longest[2] <= 128
    assert max(targets(rows).values()) == 1


def test_a_phase_without_a_document_to_give_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.weights"):
        rows_of(Listed([[8] * 4, []]), schedule((0, [1.0, 1.0]), (5, [0.0, 1.0])), 10)


def test_documents_that_no_row_holds_are_counted_and_nothing_else_is_refused() -> None:
    unfit = media_document((1, 20))
    some = Listed([[20, 8, 8, 8]], {0: unfit})
    made = Stream(some, alike(some))
    rows = [row for block in made.blocks(6) for row in block]
    assert {piece.document for row in rows for piece in row} == {1, 2, 3}
    assert made.record.skipped > 0
    none = Listed([[20]], {0: unfit})
    with pytest.raises(DataError, match=r"no document fits a row of data.seq_len=16.*20 tokens"):
        rows_of(none, alike(none), 1)


@quiet
@given(st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=20), min_size=1, max_size=3), st.integers(1, 12))
def test_heldout_rows_hold_each_source_and_no_token_twice(tokens: list[list[int]], rows: int) -> None:
    documents = Listed(tokens)
    made = heldout_rows(documents, SEQ_LEN, rows, "segment")
    assert {documents.source(piece.document) for row in made for piece in row} == set(range(len(tokens)))
    assert max(targets(made).values()) == 1
    assert all(sum(piece.tokens for piece in row) <= SEQ_LEN for row in made)
    assert made == heldout_rows(documents, SEQ_LEN, rows, "segment")


def test_heldout_rows_share_their_tokens_equally_between_sources() -> None:
    documents = Listed([[8] * 150, [8] * 50])
    made = heldout_rows(documents, SEQ_LEN, 10, "segment")
    assert Counter(documents.source(piece.document) for row in made for piece in row) == {0: 10, 1: 10}
    assert len(made) == 10


class Hashed(Listed):
    """Lists of lengths that go by a corpus's hash."""

    def __init__(self, tokens: list[list[int]], sha256: str = "a") -> None:
        super().__init__(tokens)
        self.corpora = [type("Corpus", (), {"sha256": sha256})()]


GENERATOR = np.random.default_rng(0)
TOKENS = [GENERATOR.integers(2, 40, 200).tolist() for _ in range(2)]


def test_a_plan_on_disk_is_the_stream(tmp_path: Path) -> None:
    documents = Hashed(TOKENS)
    phases = schedule((0, [1.0, 2.0]), (300, [1.0, 0.0], 32))
    made = open_plan(documents, phases, 700, tmp_path)
    expected = rows_of(documents, phases, 700)
    assert len(made) == 700
    assert [made[row] for row in range(700)] == expected
    assert made.record.tokens == sum(piece.tokens for row in expected for piece in row)
    assert made.record.positions == 300 * 16 + 400 * 32
    assert made.record.pieces == sum(map(len, expected))
    assert made.record.epochs["source_0"] > 0


def test_a_plan_is_built_once_and_serves_every_shorter_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Hashed(TOKENS)
    first = open_plan(documents, alike(documents), 500, tmp_path)
    monkeypatch.setattr(plan_module, "Stream", lambda *_: pytest.fail("built again"))
    assert open_plan(documents, alike(documents), 500, tmp_path).folder == first.folder
    assert open_plan(documents, alike(documents), 20, tmp_path).folder == first.folder


def test_a_longer_run_gets_a_plan_of_its_own_with_the_same_beginning(tmp_path: Path) -> None:
    documents = Hashed(TOKENS)
    short, long = (open_plan(documents, alike(documents), rows, tmp_path) for rows in (300, 900))
    assert short.folder != long.folder
    assert [short[row] for row in range(300)] == [long[row] for row in range(300)]


def test_everything_that_decides_the_stream_is_in_the_key() -> None:
    documents = Hashed(TOKENS)
    phase = Phase(0, (1.0, 1.0), 16)
    variants = [
        plan_key(documents, Schedule((phase,), 0, "segment")),
        plan_key(Hashed(TOKENS, "b"), Schedule((phase,), 0, "segment")),
        plan_key(documents, Schedule((phase,), 1, "segment")),
        plan_key(documents, Schedule((phase,), 0, "window")),
        plan_key(documents, Schedule((Phase(0, (1.0, 2.0), 16),), 0, "segment")),
        plan_key(documents, Schedule((Phase(0, (1.0, 1.0), 32),), 0, "segment")),
        plan_key(documents, Schedule((phase, Phase(7, (1.0, 1.0), 16)), 0, "segment")),
    ]
    assert len(set(variants)) == len(variants)


def test_what_an_interrupted_build_left_is_built_again(tmp_path: Path) -> None:
    documents = Hashed(TOKENS)
    made = open_plan(documents, alike(documents), 300, tmp_path)
    expected = [made[row] for row in range(300)]
    (made.folder / "plan.json").unlink()
    (made.folder / "pieces").write_bytes(b"half")
    again = open_plan(documents, alike(documents), 300, tmp_path)
    assert [again[row] for row in range(300)] == expected


@pytest.mark.parametrize("damage", ["plan.json", "pieces", "rows"])
def test_a_plan_that_is_cut_short_is_built_again(damage: str, tmp_path: Path) -> None:
    documents = Hashed(TOKENS)
    made = open_plan(documents, alike(documents), 300, tmp_path)
    expected = [made[row] for row in range(300)]
    path = made.folder / damage
    del made
    path.write_bytes(path.read_bytes()[:20])
    again = open_plan(documents, alike(documents), 300, tmp_path)
    assert [again[row] for row in range(300)] == expected


def test_a_finished_plan_is_opened_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = Hashed(TOKENS)
    made = open_plan(documents, alike(documents), 300, tmp_path)
    monkeypatch.setattr(plan_module, "FileLock", lambda *_: pytest.fail("locked"))
    assert open_plan(documents, alike(documents), 300, tmp_path).folder == made.folder


def test_a_corpus_is_held_out_alike_whichever_others_stand_beside_it() -> None:
    first, both = Listed([[8] * 150, [8] * 50]), Listed([[8] * 150, [8] * 50, [6] * 90])
    both.corpus_S = np.array([0, 0, 1])
    alone, together = (heldout_rows(documents, SEQ_LEN, 10, "segment") for documents in (first, both))
    assert together[: len(alone)] == alone
    assert {both.source(piece.document) for row in together[len(alone) :] for piece in row} == {2}


def test_a_folder_that_cannot_be_written_is_refused_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    documents = Hashed(TOKENS)
    with pytest.raises(DataError, match=r"no packing plan can be written to .*: set data\.plans=<folder>"):
        open_plan(documents, alike(documents), 10, tmp_path / "file" / "plans")


def resident_bytes(folder: Path, answer: "Queue") -> None:  # noqa: F821
    """What opening a plan and reading rows all over it adds to a process."""
    import psutil

    before = psutil.Process().memory_info().rss
    made = Plan(folder)
    for row in np.linspace(0, len(made) - 1, 20).astype(int):
        made[int(row)]
    answer.put(psutil.Process().memory_info().rss - before)


def test_a_thousand_times_the_rows_cost_a_rank_no_more_memory(tmp_path: Path) -> None:
    """Files of 1 thousand and of 20 million rows, the second one sparse."""
    grown = []
    for rows in (1_000, 20_000_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        record = {"key": "k", "rows": rows, "pieces": rows, "tokens": 1, "positions": 1, "skipped": 0, "epochs": {}}
        (folder / "plan.json").write_text(json.dumps(record))
        for name, size in (("rows", 8 * (rows + 1)), ("pieces", 16 * rows)):
            with (folder / name).open("wb") as file:
                file.truncate(size)
        context = get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=resident_bytes, args=(folder, answer))
        process.start()
        grown.append(answer.get(timeout=60))
        process.join()
    assert grown[1] < grown[0] + (4 << 20)
