"""A permutation that is computed: each place holds another number, and every key another order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.data.shuffle import mix, shuffled

quiet = settings(max_examples=60, deadline=None)


@quiet
@given(st.integers(1, 3_000), st.integers(0, 2**63 - 1), st.integers(0, 300), st.integers(0, 50))
def test_every_number_stands_at_one_place(length: int, seed: int, source: int, epoch: int) -> None:
    order = shuffled(np.arange(length), length, seed, source, epoch)
    assert sorted(order.tolist()) == list(range(length))


@quiet
@given(st.integers(1, 10**12), st.integers(0, 100))
def test_a_place_is_found_without_the_others(length: int, seed: int) -> None:
    """Of a trillion, too, and the same whether asked alone or among others."""
    places = np.unique(np.linspace(0, length - 1, 50).astype(np.int64))
    together = shuffled(places, length, seed)
    assert [int(shuffled(np.array([place]), length, seed)[0]) for place in places] == together.tolist()
    assert len(set(together.tolist())) == len(places)
    assert together.min() >= 0
    assert together.max() < length


def test_every_part_of_the_key_changes_the_order() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0), (0, 1)]
    orders = {tuple(shuffled(np.arange(100), 100, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)
    assert tuple(range(100)) not in orders


def test_orders_are_spread_evenly() -> None:
    """Each number stands at each place about equally often over many keys, and neighbours do not stay neighbours."""
    orders = np.array([shuffled(np.arange(10), 10, key) for key in range(5_000)])
    for place in range(10):
        counts = np.bincount(orders[:, place], minlength=10)
        assert counts.min() > 400
        assert counts.max() < 600
    steps = Counter(np.diff(orders, axis=1).ravel().tolist())
    assert steps[1] / steps.total() == pytest.approx(0.1, abs=0.015)


def test_the_mixer_is_splitmix64s() -> None:
    """The first three numbers of the generator seeded with 1234567, as its author publishes them."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
