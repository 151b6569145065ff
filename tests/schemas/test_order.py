from lilpipe.schemas.order import rows_of_step
from lilpipe.seeds import derive_seed


def test_every_epoch_visits_each_row_once_in_an_order_of_its_own():
    rows = [row for step in range(6) for row in rows_of_step(step, num_rows=10, batch_size=5, seed=0)]
    epochs = [rows[:10], rows[10:20], rows[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_two_epochs():
    rows = [row for step in range(3) for row in rows_of_step(step, num_rows=4, batch_size=3, seed=0)]
    assert sorted(rows[:4]) == sorted(rows[4:8]) == [0, 1, 2, 3]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(rows_of_step(0, num_rows=2, batch_size=4, seed=0)) == [0, 0, 1, 1]


def test_seeds_of_different_purposes_and_positions_differ():
    seeds = {derive_seed(seed, purpose, step) for seed in range(3) for purpose in "ab" for step in range(50)}
    assert len(seeds) == 300
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
