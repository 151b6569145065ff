import pytest
import torch

from lilpipe.generation import pages as module
from lilpipe.generation.pages import CLOSED, PAGE_SIZE, PagePool, cache_widths, pages_for
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import SMALL_MLA


def cache_bytes_per_token(model):
    """Bytes that a cached token takes in all layers, without what is free in its page."""
    heads, key_width, value_width = cache_widths(model.config)
    return model.config.num_layers * heads * (key_width + value_width) * next(model.parameters()).element_size()


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=30)


@pytest.fixture
def pool(model):
    return PagePool(model)


def test_pages_are_the_lowest_that_are_free(pool):
    assert pool.take(3) == [0, 1, 2]
    pool.give([1, 0])
    assert pool.take(1) == [0]
    assert pool.take(2) == [1, 3]
    assert pool.num_used == pool.extent == 4


def test_a_larger_pool_holds_what_the_smaller_one_held(pool):
    pool.take(2)
    pool.keys_LNKES.fill_(3.0)
    pool.values_LNKSF.fill_(4.0)
    pool.closed_NS[1, 5] = 0.0
    pool.take(10)
    assert (pool.keys_LNKES[:, :2] == 3).all()
    assert (pool.values_LNKSF[:, :2] == 4).all()
    assert not pool.keys_LNKES[:, 2:].any()
    assert torch.equal((pool.closed_NS == 0).nonzero(), torch.tensor([[1, 5]]))


def test_a_page_that_comes_back_is_closed(pool):
    pages = pool.take(2)
    pool.closed_NS[:] = 0.0
    pool.give(pages[:1])
    assert (pool.closed_NS[pages[0]] == CLOSED).all()
    assert (pool.closed_NS[pages[1]] == 0).all()
    pool.give([])
    assert pool.num_used == 1


def test_compacting_moves_the_last_pages_to_the_front_with_all_they_hold(pool):
    pool.take(6)
    for page in range(6):
        pool.keys_LNKES[:, page] = page
        pool.values_LNKSF[:, page] = -page
        pool.closed_NS[page, : page + 1] = 0.0
    pool.give([0, 1, 3, 4])
    moved = pool.compact()
    assert sorted(moved) == [2, 5]
    assert sorted(moved.values()) == [0, 1]
    assert pool.num_used == pool.extent == 2
    for old, new in moved.items():
        assert (pool.keys_LNKES[:, new] == old).all()
        assert (pool.values_LNKSF[:, new] == -old).all()
        assert (pool.closed_NS[new] == 0).sum() == old + 1
    assert (pool.closed_NS[2:] == CLOSED).all()
    assert pool.compact() == {}
    assert pool.take(4) == [2, 3, 4, 5]


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2)])
def test_pages_for_tokens(tokens, count):
    assert pages_for(tokens) == count


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [({}, 3 * 2 * 2 * 8), ({"mla": SMALL_MLA}, 3 * (16 + 4)), ({"num_kv_heads": 4}, 3 * 2 * 4 * 8)],
)
def test_bytes_of_a_cached_token_are_those_of_its_keys_and_values(changes, numbers):
    model = small_model(SMALL.model_copy(update=changes), vocab_size=30)
    assert cache_bytes_per_token(model) == 4 * numbers
    assert cache_bytes_per_token(model.double()) == 8 * numbers
    pool = PagePool(model.float())
    pool.take(7)
    held = sum(pages.numel() * pages.element_size() for pages in (pool.keys_LNKES, pool.values_LNKSF))
    assert held == 7 * PAGE_SIZE * cache_bytes_per_token(model)


def test_a_pool_grows_by_a_share_of_what_it_has(pool):
    pool.take(100)
    pool.take(1)
    assert pool.capacity == int(100 * module.GROWTH)
