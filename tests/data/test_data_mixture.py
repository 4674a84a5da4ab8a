"""Which document comes next: shares of tokens, whole epochs, nothing but the arguments."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data.mixture import DocumentOrder, source_weights
from omniloom.errors import ConfigError

quiet = settings(max_examples=60, deadline=None)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Lengths, sources and weights of some documents, and a seed; some source has both."""
    sources = draw(st.integers(1, 4))
    source = draw(st.lists(st.integers(0, sources - 1), min_size=1, max_size=25))
    tokens = draw(st.lists(st.integers(2, 60), min_size=len(source), max_size=len(source)))
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.0]), min_size=sources, max_size=sources))
    weights[source[0]] += 0.25
    return np.array(tokens), np.array(source), np.array(weights), draw(st.integers(0, 5))


def take(count: int, tokens: np.ndarray, source: np.ndarray, weights: np.ndarray, seed: int) -> list[int]:
    return list(islice(DocumentOrder(tokens, source, weights, seed), count))


@quiet
@given(mixtures())
def test_each_document_of_a_source_comes_once_before_any_comes_again(mixture: tuple) -> None:
    _, source, weights, _ = mixture
    order = np.array(take(150, *mixture))
    for number in range(len(weights)):
        members = np.flatnonzero(source == number).tolist()
        mine = order[source[order] == number].tolist()
        for start in range(0, len(mine), max(len(members), 1)):
            epoch = mine[start : start + len(members)]
            assert len(set(epoch)) == len(epoch)
            assert sorted(epoch) == members or start + len(members) > len(mine)


@quiet
@given(mixtures())
def test_shares_of_tokens_stay_within_a_few_documents_of_the_weights(mixture: tuple) -> None:
    """The source furthest behind comes next, so none is ever more than one document of each source away."""
    tokens, source, weights, _ = mixture
    order = take(200, *mixture)
    has_documents = np.isin(np.arange(len(weights)), source)
    share = weights * has_documents / (weights * has_documents).sum()
    given_tokens = np.zeros(len(weights))
    for document in order:
        given_tokens[source[document]] += tokens[document]
        assert np.abs(given_tokens - share * given_tokens.sum()).max() <= tokens.max() * len(weights)
    assert (given_tokens[share == 0] == 0).all()


@quiet
@given(mixtures())
def test_the_order_is_a_function_of_its_arguments(mixture: tuple) -> None:
    assert take(60, *mixture) == take(60, *mixture)


def test_shares_come_to_the_weights_by_hand() -> None:
    tokens, source = np.array([10] * 6 + [30] * 4), np.array([0] * 6 + [1] * 4)
    order = take(4_000, tokens, source, np.array([3.0, 1.0]), seed=0)
    words = tokens[order][source[order] == 0].sum()
    assert words / tokens[order].sum() == pytest.approx(0.75, abs=0.002)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    mixture = np.full(20, 5), np.zeros(20, int), np.ones(1)
    order = take(60, *mixture, seed=0)
    epochs = [order[:20], order[20:40], order[40:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(20))
    assert take(20, *mixture, seed=1) != epochs[0]


def test_two_sources_are_not_shuffled_alike() -> None:
    order = take(40, np.full(40, 5), np.repeat([0, 1], 20), np.ones(2), seed=0)
    assert [d for d in order if d < 20] != [d - 20 for d in order if d >= 20]


@pytest.mark.parametrize(("weights", "source"), [([0.0, 0.0], [0, 1]), ([1.0, 0.0], [1, 1])])
def test_no_weight_on_any_document_is_refused(weights: list[float], source: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"set data\.weights"):
        take(1, np.array([5, 5]), np.array(source), np.array(weights), 0)


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
def test_weights_set_anew_begin_to_count_anew_and_keep_the_epochs(mixture: tuple, first: int, factor: float) -> None:
    """What was given before owes nothing; each source's stream goes on where it stood."""
    tokens, source, weights, seed = mixture
    order = DocumentOrder(tokens, source, weights, seed)
    stream = iter(order)
    before = list(islice(stream, first))
    changed = weights.copy()
    changed[source[0]] *= factor
    order.weigh(changed)
    after = list(islice(stream, 100))
    has_documents = np.isin(np.arange(len(weights)), source)
    share = changed * has_documents / (changed * has_documents).sum()
    given_tokens = np.zeros(len(weights))
    for document in after:
        given_tokens[source[document]] += tokens[document]
        assert np.abs(given_tokens - share * given_tokens.sum()).max() <= tokens.max() * len(weights)
    for number in range(len(weights)):
        members = np.flatnonzero(source == number).tolist()
        mine = [document for document in before + after if source[document] == number]
        for start in range(0, len(mine) - len(members) + 1, max(len(members), 1)):
            assert sorted(mine[start : start + len(members)]) == members
