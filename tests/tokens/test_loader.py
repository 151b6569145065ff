from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.loader import PretrainLoader, interleave, permute, validation_rows
from lilpipe.tokens.shards import TokenShards

SHARES = {"corpus": 0.6, "exercises": 0.4}


def make(built, **options):
    settings = {"shares": SHARES, "seq_len": 16, "batch_size": 8, "num_steps": 40, "seed": 3, **options}
    return PretrainLoader(TokenShards.open(built.workspace.output), **settings)


def whole(built, source, split="train"):
    stream = built.shards.stream(source, split)
    return stream.read(0, stream.num_tokens).astype(np.int64)


def test_a_row_is_a_window_of_its_stream_and_targets_are_inputs_one_on(built):
    loader = make(built)
    inputs_BT, targets_BT = loader.batch(5)
    assert inputs_BT.shape == targets_BT.shape == (8, 16)
    assert inputs_BT.dtype == targets_BT.dtype == torch.int64
    for index in range(8):
        row = loader.row(5, index)
        expected = whole(built, row.source)[row.window * 16 : row.window * 16 + 17]
        assert inputs_BT[index].tolist() == expected[:-1].tolist()
        assert targets_BT[index].tolist() == expected[1:].tolist()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_slices_of_all_ranks_make_up_the_batch_of_one(built, world_size):
    alone = make(built).batch(7)
    parts = [make(built).batch(7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole_BT, slices in zip(alone, zip(*parts, strict=True), strict=True):
        for rank, part_BT in enumerate(slices):
            assert torch.equal(part_BT, whole_BT[rank::world_size])


def test_a_batch_does_not_depend_on_what_was_read_before(built):
    used = make(built)
    for step in (0, 39, 2, 2, 17):
        used.batch(step)
    for ours, fresh in zip(used.batch(11), make(built).batch(11), strict=True):
        assert torch.equal(ours, fresh)


def test_another_seed_gives_another_order(built):
    assert not torch.equal(make(built).batch(0)[0], make(built, seed=4).batch(0)[0])


def test_any_number_of_rows_keeps_to_the_shares_within_a_row(built):
    loader = make(built)
    counts = Counter()
    for index in range(40 * 8):
        counts[loader.row(*divmod(index, 8)).source] += 1
        for source, share in SHARES.items():
            assert abs(counts[source] - share * (index + 1)) <= 0.5


def test_three_sources_keep_to_their_shares():
    shares = {"a": Fraction(1, 2), "b": Fraction(3, 10), "c": Fraction(1, 5)}
    counts = Counter()
    for index in range(1000):
        source, before = interleave(index, shares)
        assert before == counts[source]
        counts[source] += 1
        assert all(abs(counts[name] - share * (index + 1)) < 1.5 for name, share in shares.items())


def test_every_window_is_read_once_in_each_epoch_and_in_another_order(built):
    num_windows = make(built).streams["corpus"].num_windows(16)
    loader = make(built, shares={"corpus": 1.0}, batch_size=1, num_steps=3 * num_windows)
    rows = [loader.row(step, 0) for step in range(3 * num_windows)]
    epochs = [[row.window for row in rows if row.epoch == epoch] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_windows))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(num_windows))
    assert loader.epochs("corpus") == 3


def test_every_token_but_the_first_is_a_target_once_in_an_epoch(built):
    tokens = whole(built, "corpus")
    num_windows = (len(tokens) - 1) // 16
    loader = make(built, shares={"corpus": 1.0}, batch_size=1, num_steps=num_windows)
    rows = sorted((loader.row(step, 0).window, loader.batch(step)[1][0].tolist()) for step in range(num_windows))
    assert [token for _, row in rows for token in row] == tokens[1 : num_windows * 16 + 1].tolist()


def test_a_row_can_be_traced_to_its_documents(built, tokenizer):
    loader = make(built)
    texts = {}
    for source in ("corpus", "exercises"):
        for shard in built.shards.stream(source, "train").shards:
            for row, name in enumerate(shard.ids.to_pylist()):
                texts[name] = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]].tolist()
    for index in range(8):
        inputs_BT, targets_BT = loader.batch(3)
        window = [*inputs_BT[index].tolist(), targets_BT[index, -1].item()]
        located = loader.locate(3, index)
        joined = [token for name, _ in located for token in texts[name]]
        assert any(joined[start : start + 17] == window for start in range(len(joined)))
        assert {source for _, source in located} == {
            "books" if loader.row(3, index).source == "corpus" else "exercises"
        }


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_a_permutation_hits_everything_once(size):
    assert sorted(permute(index, size, key="k") for index in range(size)) == list(range(size))


def test_permutations_look_random():
    # Each index should land anywhere: chi-squared over 16 cells, 2,000 keys; 99.9th percentile of 15 degrees is 37.7.
    for index in (0, 7, 15):
        counts = Counter(permute(index, 16, key=f"seed {key}") for key in range(2000))
        assert sum((counts[cell] - 125) ** 2 / 125 for cell in range(16)) < 37.7
    images = np.array([permute(index, 1000, key="k") for index in range(1000)])
    assert abs(np.corrcoef(np.arange(1000), images)[0, 1]) < 0.1
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1


def test_validation_rows_are_windows_with_their_bytes_of_text(built, tokenizer):
    tokens = whole(built, "corpus", "validation").tolist()
    inputs_BT, targets_BT, num_bytes = make(built).validation("corpus", 3)
    assert inputs_BT.shape == targets_BT.shape == (3, 16)
    expected = 0
    for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True):
        window = [*inputs_T, targets_T[-1]]
        assert window[1:] == targets_T
        assert any(tokens[start : start + 17] == window for start in range(0, len(tokens), 16))
        ranks = {rank: token for token, rank in tokenizer.ranks.items()}
        expected += sum(len(ranks.get(token, b"")) for token in targets_T)
    assert num_bytes == expected


def test_all_validation_windows_are_taken_where_more_are_asked_for(built):
    tokens = whole(built, "corpus", "validation")
    inputs_BT, targets_BT, _ = validation_rows(built.shards, "corpus", num_rows=10_000, seq_len=16)
    assert len(inputs_BT) == (len(tokens) - 1) // 16
    assert targets_BT.flatten().tolist() == tokens[1 : len(inputs_BT) * 16 + 1].tolist()


def test_a_source_with_too_few_rows_for_a_batch_is_an_error_with_numbers(built):
    num_tokens = built.shards.stream("exercises", "train").num_tokens
    with pytest.raises(
        DataError,
        match=rf"'exercises': got 3 rows of 301 tokens \({num_tokens} tokens in all\), expected at least 4 .*40%",
    ):
        make(built, seq_len=300, shares={"exercises": 0.4, "corpus": 0.6})


def test_validation_text_shorter_than_a_row_is_an_error_with_numbers(built):
    with pytest.raises(DataError, match=r"validation split of source 'corpus': got \d+ tokens, expected at least 5001"):
        validation_rows(built.shards, "corpus", num_rows=4, seq_len=5000)


def test_shares_must_add_up_and_name_sources_that_are_there(built):
    with pytest.raises(ConfigError, match="expected shares that add up to 1"):
        make(built, shares={"corpus": 0.6, "exercises": 0.3})
    with pytest.raises(ConfigError, match=r"got 'web', expected sources of the tokens: corpus, exercises"):
        make(built, shares={"corpus": 0.6, "web": 0.4})
    assert make(built, shares={"corpus": 1.0, "web": 0.0}).row(0, 0).source == "corpus"
