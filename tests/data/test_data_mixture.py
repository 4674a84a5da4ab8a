"""Which document comes next: shares of tokens, whole epochs, nothing but the arguments."""

from itertools import count
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import Listed

from omniloom.data import mixture
from omniloom.data.mixture import DocumentOrder, source_weights
from omniloom.data.pack import PIECE
from omniloom.errors import ConfigError

quiet = settings(max_examples=60, deadline=None)
Mixture = tuple[Listed, np.ndarray, int]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Documents of some sources, weights and a seed; some source has both."""
    tokens = draw(st.lists(st.lists(st.integers(2, 60), max_size=12), min_size=1, max_size=4))
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.0]), min_size=len(tokens), max_size=len(tokens)))
    tokens[0].append(5)
    weights[0] += 0.25
    return Listed(tokens), np.array(weights), draw(st.integers(0, 5))


def next_ones(order: DocumentOrder, asked: int) -> list[int]:
    """The next `asked` documents; what was drawn beyond them is put back."""
    taken = np.zeros(0, PIECE)
    while len(taken) < asked:
        taken = np.concatenate([taken, order.take()])
    order.put_back(taken[asked:])
    return taken[:asked]["document"].tolist()


def take(asked: int, documents: Listed, weights: np.ndarray, seed: int, chunk: int = 64) -> list[int]:
    with patch.object(mixture, "CHUNK_TOKENS", chunk):
        order = DocumentOrder(documents, seed)
        order.weigh(weights)
        return next_ones(order, asked)


def members(documents: Listed, source: int) -> list[int]:
    return list(range(documents.first_S[source], documents.first_S[source + 1]))


def share_of(documents: Listed, weights: np.ndarray) -> np.ndarray:
    has_documents = np.diff(documents.first_S) > 0
    return weights * has_documents / (weights * has_documents).sum()


def literal_order(documents: Listed, weights: np.ndarray, seed: int, asked: int) -> list[int]:
    """The rule word by word: of all sources, the one whose next document begins first."""
    share, given_tokens, drawn = share_of(documents, weights), np.zeros(len(weights)), np.zeros(len(weights), int)
    order = []
    for _ in range(asked):
        begins = [(given_tokens[s] / share[s], -share[s], s) for s in range(len(weights)) if share[s] > 0]
        source = min(begins)[2]
        mine = members(documents, source)
        epoch, place = divmod(drawn[source], len(mine))
        number = mine[int(mixture.shuffled(np.array([place]), len(mine), seed, source, epoch)[0])]
        order.append(number)
        drawn[source] += 1
        given_tokens[source] += documents.lengths(np.array([number]))["tokens"][0]
    return order


@quiet
@given(mixtures(), st.sampled_from([1, 30, 1_000, 1 << 20]))
def test_the_order_is_the_rules_whatever_is_drawn_at_a_time(mixed: Mixture, chunk: int) -> None:
    assert take(80, *mixed, chunk=chunk) == literal_order(*mixed, asked=80)


@quiet
@given(mixtures())
def test_each_document_of_a_source_comes_once_before_any_comes_again(mixed: Mixture) -> None:
    documents = mixed[0]
    order = take(150, *mixed)
    for source in range(len(documents.names)):
        mine, all_of_it = [d for d in order if documents.source(d) == source], members(documents, source)
        for start in range(0, len(mine), max(len(all_of_it), 1)):
            epoch = mine[start : start + len(all_of_it)]
            assert len(set(epoch)) == len(epoch)
            assert sorted(epoch) == all_of_it or start + len(all_of_it) > len(mine)


@quiet
@given(mixtures())
def test_no_source_is_ever_further_behind_than_a_document_of_each(mixed: Mixture) -> None:
    documents, weights, _ = mixed
    share, given_tokens = share_of(documents, weights), np.zeros(len(weights))
    for number in take(200, *mixed):
        given_tokens[documents.source(number)] += documents.lengths(np.array([number]))["tokens"][0]
        assert np.abs(given_tokens - share * given_tokens.sum()).max() <= 60 * len(weights)
    assert (given_tokens[share == 0] == 0).all()


def test_shares_come_to_the_weights_by_hand() -> None:
    documents = Listed([[10] * 6, [30] * 4])
    order = take(4_000, documents, np.array([3.0, 1.0]), seed=0)
    tokens = documents.lengths(np.array(order))["tokens"]
    words = tokens[np.array(order) < 6].sum()
    assert words / tokens.sum() == pytest.approx(0.75, abs=0.002)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    mixed = Listed([[5] * 20]), np.ones(1)
    order = take(60, *mixed, seed=0)
    epochs = [order[:20], order[20:40], order[40:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(20))
    assert take(20, *mixed, seed=1) != epochs[0]


def test_two_sources_are_not_shuffled_alike() -> None:
    order = take(40, Listed([[5] * 20, [5] * 20]), np.ones(2), seed=0)
    assert [d for d in order if d < 20] != [d - 20 for d in order if d >= 20]


@pytest.mark.parametrize(("weights", "tokens"), [([0.0, 0.0], [[5], [5]]), ([1.0, 0.0], [[], [5]])])
def test_no_weight_on_any_document_is_refused(weights: list[float], tokens: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match=r"set data\.weights"):
        take(1, Listed(tokens), np.array(weights), 0)


def test_preference_pairs_are_never_drawn() -> None:
    documents = Listed([[5] * 4, [5] * 4])
    documents.is_streamed_S = np.array([True, False])
    assert set(take(40, documents, np.ones(2), 0)) == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match="no source with a weight"):
        take(1, documents, np.array([0.0, 1.0]), 0)


def test_replaced_weights_go_over_the_manifests() -> None:
    weights = source_weights(["topics", "digits"], [0.7, 0.3], {"digits": 2.0}, "weights")
    assert weights.tolist() == [0.7, 2.0]
    assert source_weights(["topics"], [0.7], {"topics": 0.0}, "weights").tolist() == [0.0]


@pytest.mark.parametrize("key", ["weights", "loss_weights"])
def test_an_unknown_source_is_named_with_the_nearest(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}\.digit names no source.*did you mean 'digits'\?"):
        source_weights(["topics", "digits"], [0.7, 0.3], {"digit": 1.0}, key)


@quiet
@given(mixtures(), st.integers(0, 40), st.sampled_from([0.5, 3.0]))
def test_weights_set_anew_begin_to_count_anew_and_keep_the_epochs(mixed: Mixture, first: int, factor: float) -> None:
    """What was given before owes nothing; each source's documents go on where they stood."""
    with patch.object(mixture, "CHUNK_TOKENS", 64):
        check_weights_set_anew(*mixed, first, factor)


def check_weights_set_anew(documents: Listed, weights: np.ndarray, seed: int, first: int, factor: float) -> None:
    order = DocumentOrder(documents, seed)
    order.weigh(weights)
    before = next_ones(order, first)
    changed = weights * np.array([factor, *np.ones(len(weights) - 1)])
    order.weigh(changed)
    after = next_ones(order, 100)
    share, given_tokens = share_of(documents, changed), np.zeros(len(weights))
    for number in after:
        given_tokens[documents.source(number)] += documents.lengths(np.array([number]))["tokens"][0]
        assert np.abs(given_tokens - share * given_tokens.sum()).max() <= 60 * len(weights)
    for source in range(len(weights)):
        all_of_it = members(documents, source)
        mine = [number for number in before + after if documents.source(number) == source]
        for start in range(0, len(mine) - len(all_of_it) + 1, max(len(all_of_it), 1)):
            assert sorted(mine[start : start + len(all_of_it)]) == all_of_it


def test_what_is_put_back_comes_first_when_its_source_is_drawn_again() -> None:
    """Parts of documents too; another source's documents do not wait for them."""
    documents = Listed([[10] * 5, [10] * 5])
    with patch.object(mixture, "CHUNK_TOKENS", 40):
        order = DocumentOrder(documents, 0)
        order.weigh(np.array([1.0, 0.0]))
        taken = order.take()
        parts = np.array([(taken["document"][0], 4, 10), (taken["document"][2], 0, 10)], PIECE)
        order.put_back(parts)
        assert order.epochs_S.tolist() == [3 / 5, 0]
        order.weigh(np.array([0.0, 1.0]))
        assert (order.take()["document"] >= 5).all()
        order.weigh(np.array([1.0, 0.0]))
        again = order.take()
    assert again[:2].tolist() == parts.tolist()
    assert again[2]["document"] not in taken["document"]


def test_a_billion_documents_are_not_looked_through() -> None:
    """Their lengths lie in a file of which only what is drawn is read; here one number stands for all of them."""
    documents = Listed([[7], [9]])
    billion = 10**9
    documents.lengths_S = [np.broadcast_to(lengths, billion) for lengths in documents.lengths_S]
    documents.first_S, documents.tokens_S = np.array([0, billion, 2 * billion]), np.array([7, 9]) * billion
    order = DocumentOrder(documents, 0)
    order.weigh(np.ones(2))
    taken = next_ones(order, 1_000)
    assert len(set(taken)) == 1_000
    assert sum(number < billion for number in taken) == pytest.approx(1_000 * 9 / 16, abs=2)
    assert next(number for number in count() if number not in set(taken)) == 0  # spread out, not the first ones
