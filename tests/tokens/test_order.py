from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.tokens.order import Interleaving, permute, stream_key, unpermute

MANY = settings(max_examples=150, deadline=None)


def images(size, *, key=7, epoch=0, function=permute, indices=None):
    indices = np.arange(size) if indices is None else indices
    n = len(indices)
    return function(indices, np.full(n, size), np.full(n, key, dtype=np.uint64), np.full(n, epoch))


# --- permutations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 70))
def test_a_permutation_of_any_small_size_hits_everything_once(size):
    assert sorted(images(size)) == list(range(size))


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
@MANY
def test_a_permutation_hits_everything_once_and_its_inverse_undoes_it(size, key, epoch):
    permuted = images(size, key=key, epoch=epoch)
    assert np.array_equal(np.sort(permuted), np.arange(size))
    undone = images(size, key=key, epoch=epoch, function=unpermute, indices=permuted)
    assert np.array_equal(undone, np.arange(size))


@given(
    size=st.integers(2**31 + 1, 2**40),
    key=st.integers(0, 2**64 - 1),
    places=st.lists(st.integers(0, 2**31), min_size=1),
)
@MANY
def test_indices_of_sizes_that_no_list_could_hold_come_back_from_their_images(size, key, places):
    permuted = images(size, key=key, indices=np.array(places))
    assert ((permuted >= 0) & (permuted < size)).all()
    assert images(size, key=key, function=unpermute, indices=permuted).tolist() == places


def test_an_image_does_not_depend_on_what_is_computed_beside_it():
    sizes, epochs = np.array([10, 1000, 17, 10]), np.array([0, 3, 1, 1])
    keys = np.array([stream_key(0, name) for name in "abca"], dtype=np.uint64)
    together = permute(np.array([3, 999, 0, 3]), sizes, keys, epochs)
    alone = [
        int(permute(np.array([index]), sizes[n : n + 1], keys[n : n + 1], epochs[n : n + 1])[0])
        for n, index in enumerate((3, 999, 0, 3))
    ]
    assert together.tolist() == alone


def test_every_index_lands_anywhere_over_keys_and_over_epochs():
    # Chi-squared over 16 cells of 4,000 draws; the 99.9th percentile of 15 degrees is 37.7.
    keys = np.array([stream_key(seed, "corpus") for seed in range(4000)], dtype=np.uint64)
    for index in (0, 7, 15):
        indices, sizes = np.full(4000, index), np.full(4000, 16)
        by_key = permute(indices, sizes, keys, np.zeros(4000, dtype=np.int64))
        by_epoch = permute(indices, sizes, np.full(4000, keys[0]), np.arange(4000))
        for landed in (by_key, by_epoch):
            assert ((np.bincount(landed, minlength=16) - 250) ** 2 / 250).sum() < 37.7


def test_neighbours_land_independently():
    permuted = images(100_003)
    for other in (np.arange(100_003), np.roll(permuted, 1), images(100_003, epoch=1), images(100_003, key=8)):
        assert abs(np.corrcoef(permuted, other)[0, 1]) < 0.015
    # Of differences that are as good as random, 1 - 1/e of all values come up.
    differences = np.unique((permuted - np.roll(permuted, 1)) % 100_003)
    assert abs(len(differences) / 100_003 - (1 - np.exp(-1))) < 0.01


# --- interleaving -------------------------------------------------------------------------------------------------


@st.composite
def shares(draw):
    weights = draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=8))
    return {f"stream {index}": weight / sum(weights) for index, weight in enumerate(weights)}


@given(shares(), st.integers(0, 10**9))
@MANY
def test_places_count_up_within_each_stream_and_the_inverse_finds_them(wanted, first):
    interleaving = Interleaving(wanted)
    places = np.arange(first, first + 300)
    streams, before = interleaving.at(places)
    for number, name in enumerate(interleaving.names):
        mine = before[streams == number]
        start = interleaving.count(name, first)
        assert mine.tolist() == list(range(start, start + len(mine)))
        assert interleaving.count(name, first + 300) == start + len(mine)
        assert interleaving.places(name, mine).tolist() == places[streams == number].tolist()


@given(shares())
@MANY
def test_any_prefix_keeps_to_the_shares(wanted):
    interleaving = Interleaving(wanted)
    streams, _ = interleaving.at(np.arange(1000))
    slack = 0.5 * (len(interleaving.names) - 1) + 0.01
    for number, name in enumerate(interleaving.names):
        counts = np.cumsum(streams == number)
        assert np.abs(counts - wanted[name] * np.arange(1, 1001)).max() <= slack


def test_half_and_half_alternates():
    streams, before = Interleaving({"a": 0.5, "b": 0.5}).at(np.arange(6))
    assert streams.tolist() == [0, 1, 0, 1, 0, 1]
    assert before.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_share_too_small_to_count_is_left_out():
    interleaving = Interleaving({"a": 1 - 1e-9, "b": 1e-9})
    assert interleaving.names == ("a",)
    assert Counter(interleaving.at(np.arange(10))[0].tolist()) == {0: 10}
