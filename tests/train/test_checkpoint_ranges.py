"""Which rank writes what, and what another number of ranks reads of it: every element once, whatever the cuts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.errors import CheckpointError
from omniloom.train.ranges import Part, Saved, overlaps, refuse_gaps, share_out

SIZE = 60


@st.composite
def cuts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """SIZE elements in pieces, some empty."""
    at = sorted([0, SIZE, *draw(st.lists(st.integers(0, SIZE), max_size=6))])
    return list(pairwise(at))


@st.composite
def held(draw: st.DrawFn) -> list[list[Part]]:
    """What ranks hold of three tensors that all of them together hold whole, cut or not, some of it several times."""
    ranks = draw(st.integers(1, 5))
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    for name in "abc":
        for start, stop in draw(cuts()):
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                parts[rank].append(Part(name, "master", "float32", start, stop))
    return parts


@settings(deadline=None)
@given(held())
def test_every_element_is_written_once_by_a_rank_that_holds_it(parts: list[list[Part]]) -> None:
    shares = share_out(parts)
    for name in "abc":
        written = sorted(part for share in shares for part in share if part.name == name)
        assert [element for part in written for element in range(part.start, part.stop)] == list(range(SIZE))
    for rank, share in enumerate(shares):
        for part in share:
            assert any(
                mine[:3] == part[:3] and mine.start <= part.start and part.stop <= mine.stop for mine in parts[rank]
            ), "a rank copies out of one fragment"


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_what_all_ranks_hold_is_spread_over_them(ranks: int, sizes: list[int]) -> None:
    everything = [Part(str(index), "master", "float32", 0, size) for index, size in enumerate(sizes)]
    loads = [sum(part.stop - part.start for part in share) for share in share_out([everything] * ranks)]
    assert max(loads) - min(loads) <= max(sizes)


def test_what_one_rank_alone_holds_counts_before_the_rest_is_spread() -> None:
    own, shared = Part("a", "master", "float32", 0, 10), Part("b", "master", "float32", 0, 5)
    assert share_out([[own, shared], [shared]]) == [[own], [shared]]


@settings(deadline=None)
@given(cuts(), cuts())
def test_any_cut_is_read_from_any_other(written: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    saved = [Saved(start, stop, f"file {start}", 100 + start) for start, stop in written if start < stop]
    refuse_gaps("a", saved, SIZE)
    for start, stop in wanted:
        read = []
        for part, low, high in overlaps("a", saved, start, stop):
            assert part.start <= low < high <= part.stop
            read += range(low, high)
        assert read == list(range(start, stop))


@settings(deadline=None)
@given(cuts(), st.data())
def test_a_gap_is_found_when_it_is_written_and_when_it_is_read(
    written: list[tuple[int, int]], data: st.DataObject
) -> None:
    saved = [Saved(start, stop, "file", 0) for start, stop in written if start < stop]
    lost = saved.pop(data.draw(st.integers(0, len(saved) - 1)))
    with pytest.raises(CheckpointError, match=rf"master of a: elements .* of {SIZE} on are held by no rank"):
        refuse_gaps("master of a", saved, SIZE)
    with pytest.raises(CheckpointError, match="are in no file of the checkpoint"):
        list(overlaps("a", saved, lost.start, lost.stop))
