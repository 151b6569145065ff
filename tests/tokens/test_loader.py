from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase import Steps
from lilpipe.tokens.loader import IGNORED, DataPhasePlan, PretrainLoader, corpus_validation_shares, validation_rows
from lilpipe.tokens.shards import TokenShards

SHARES = {"corpus": 0.6, "exercises": 0.4}


def make(built, *, shares=SHARES, seq_len=16, batch_size=8, num_steps=40, seed=3, **options):
    """A loader of a run that is one data phase."""
    plan = DataPhasePlan([Steps(0, num_steps, batch_size)], seq_len, shares)
    return PretrainLoader(TokenShards.open(built.workspace.output), [plan], seed=seed, **options)


def packing_of(loader, stream):
    return loader.data_phases[0].sources[stream].packing


def whole(built, stream, split="train"):
    tokens = built.shards.stream(stream, split)
    return tokens.read(0, tokens.num_tokens).astype(np.int64)


def rows(loader, step):
    """Stream, epoch and number of each row of a step."""
    streams, epochs, numbers = loader.rows(step)
    return [(list(loader.streams)[s], e, n) for s, e, n in zip(streams, epochs.tolist(), numbers.tolist(), strict=True)]


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_slices_of_all_ranks_make_up_the_batch_of_one(built, world_size, packing):
    alone = make(built, packing=packing).batch(7)
    parts = [make(built, packing=packing).batch(7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole_BT, slices in zip(alone, zip(*parts, strict=True), strict=True):
        for rank, part_BT in enumerate(slices):
            assert torch.equal(part_BT, whole_BT[rank::world_size])


def test_a_batch_does_not_depend_on_what_was_read_before(built):
    used = make(built, num_steps=200)
    for step in (0, 199, 2, 2, 64, 63):
        used.batch(step)
    for step in (11, 64, 127):
        for ours, fresh in zip(used.batch(step), make(built, num_steps=200).batch(step), strict=True):
            assert torch.equal(ours, fresh)


def test_the_length_of_the_run_does_not_change_its_beginning(built):
    for ours, longer in zip(make(built).batch(5), make(built, num_steps=10_000).batch(5), strict=True):
        assert torch.equal(ours, longer)


def test_another_seed_gives_another_order(built):
    assert not torch.equal(make(built).batch(0).inputs, make(built, seed=4).batch(0).inputs)


def test_any_number_of_rows_keeps_to_the_shares_within_a_row(built):
    loader = make(built)
    counts = Counter()
    for index in range(40 * 8):
        counts[rows(loader, index // 8)[index % 8][0]] += 1
        for stream, share in SHARES.items():
            assert abs(counts[stream] - share * (index + 1)) <= 0.5


@pytest.mark.parametrize("options", [{}, {"stride": 5}, {"packing": "best_fit"}])
def test_every_row_is_read_once_in_each_epoch_and_in_another_order(built, options):
    num_rows = packing_of(make(built, **options), "corpus").num_rows
    loader = make(built, shares={"corpus": 1.0}, batch_size=1, num_steps=3 * num_rows, **options)
    read = [rows(loader, step)[0] for step in range(3 * num_rows)]
    epochs = [[number for _, epoch, number in read if epoch == each] for each in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_rows))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(num_rows))


def test_padding_of_one_stream_does_not_change_the_shares_of_tokens(built):
    loader = make(built, packing="best_fit", seq_len=24, num_steps=2000)
    targets = Counter()
    for step in range(2000):
        batch = loader.batch(step)
        for row, (stream, _, _) in enumerate(rows(loader, step)):
            targets[stream] += int((batch.targets[row] != IGNORED).sum())
    fill = [packing_of(loader, name).num_targets / packing_of(loader, name).num_rows for name in SHARES]
    assert abs(fill[0] - fill[1]) > 0.2  # rows of equal shares would not do
    for stream, share in SHARES.items():
        assert targets[stream] / targets.total() == pytest.approx(share, abs=1e-3)
        assert loader.num_targets(stream) == pytest.approx(targets[stream], rel=2e-3)
        assert loader.epochs(stream) == pytest.approx(targets[stream] / len(whole(built, stream)), rel=2e-3)


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 16, 7])
def test_a_row_is_a_window_of_its_stream_and_targets_are_inputs_one_on(built, stride):
    loader = make(built, stride=stride)
    for step in range(40):
        batch = loader.batch(step)
        for values in batch:
            assert (values.shape, values.dtype) == ((8, 16), torch.int64)
        for index, (stream, _, number) in enumerate(rows(loader, step)):
            start = number * (stride or 16)
            expected = whole(built, stream)[start : start + 17].tolist()
            assert batch.inputs[index].tolist() == expected[:-1]
            assert batch.targets[index].tolist() == expected[1:]


def test_every_token_but_the_first_is_a_target_once_in_an_epoch(built):
    tokens = whole(built, "corpus")
    num_rows = (len(tokens) - 1) // 16
    loader = make(built, shares={"corpus": 1.0}, batch_size=1, num_steps=num_rows)
    read = sorted((rows(loader, step)[0][2], loader.batch(step).targets[0].tolist()) for step in range(num_rows))
    assert [token for _, row in read for token in row] == tokens[1 : num_rows * 16 + 1].tolist()


def segments(inputs, end, padding):
    """Document number and position of each input, told from the ends of documents alone."""
    documents, positions = [], []
    document = position = 0
    for token in inputs:
        documents.append(-1 if token == padding else document)
        positions.append(0 if token == padding else position)
        document, position = (document + 1, 0) if token == end else (document, position + 1)
    return documents, positions


def test_documents_and_positions_begin_anew_after_each_end(built, tokenizer):
    loader = make(built)
    for step in range(40):
        batch = loader.batch(step)
        for inputs, documents, positions in zip(batch.inputs, batch.documents, batch.positions, strict=True):
            expected = segments(inputs.tolist(), tokenizer.document_end_id, tokenizer.padding_id)
            assert (documents.tolist(), positions.tolist()) == expected


def test_of_best_fit_each_pair_of_neighbours_in_a_document_is_learnt_once_in_an_epoch(built, tokenizer):
    """The oracle counts pairs (token, next) in the documents, and knows nothing of rows."""
    stream = built.shards.stream("corpus", "train")
    end, padding = tokenizer.document_end_id, tokenizer.padding_id
    documents = [stream.document(number).tokens.tolist() for number in range(stream.num_documents)]
    pairs = Counter(pair for tokens in documents for pair in pairwise(tokens))
    num_rows = packing_of(make(built, packing="best_fit"), "corpus").num_rows
    loader = make(built, shares={"corpus": 1.0}, batch_size=1, num_steps=num_rows, packing="best_fit")
    learnt, after_end = Counter(), Counter()
    num_targets = 0
    for step in range(num_rows):
        inputs, targets, numbers, positions = (values[0].tolist() for values in loader.batch(step))
        for column, (token, target) in enumerate(zip(inputs, targets, strict=True)):
            if target == IGNORED:
                continue
            num_targets += 1
            (after_end if token == end else learnt)[token, target] += 1
            assert token != padding
            if token != end and column < 15:
                assert numbers[column + 1] == numbers[column]
                assert positions[column + 1] == positions[column] + 1
        width = sum(number >= 0 for number in numbers)
        assert inputs[width:] == [padding] * (16 - width)
        assert numbers[width:] == [-1] * (16 - width)
        assert targets[width:] == [IGNORED] * (16 - width)
    assert learnt == pairs
    assert 0 < after_end.total() < len(documents)
    assert {target for _, target in after_end} <= {tokens[0] for tokens in documents}
    assert num_targets == packing_of(loader, "corpus").num_targets


# --- validation ---------------------------------------------------------------------------------------------------


def test_validation_rows_are_windows_with_their_bytes_of_text(built, tokenizer):
    tokens = whole(built, "corpus", "validation").tolist()
    inputs_BT, targets_BT, num_bytes = validation_rows(built.shards, "corpus", num_rows=3, seq_len=16)
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


def test_streams_of_the_corpus_count_by_their_bytes_of_validation_text(built, built_by_source):
    assert corpus_validation_shares(built.shards, seq_len=16) == {"corpus": 1.0}
    shards = built_by_source.shards
    num_bytes = {name: shards.stream(name, "validation").num_bytes for name in ("Big-books", "songs")}
    expected = {name: count / sum(num_bytes.values()) for name, count in num_bytes.items()}
    assert corpus_validation_shares(shards, seq_len=16) == pytest.approx(expected)
    longest = max(shards.stream(name, "validation").num_tokens for name in num_bytes) - 1
    assert list(corpus_validation_shares(shards, seq_len=longest)) == ["Big-books"]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_stream_with_too_few_rows_for_a_batch_is_an_error_with_numbers(built):
    num_tokens = built.shards.stream("exercises", "train").num_tokens
    with pytest.raises(
        DataError,
        match=rf"'exercises': got 3 rows of 300 tokens \({num_tokens} tokens in all\), expected at least 4 .*40%",
    ):
        make(built, seq_len=300, shares={"exercises": 0.4, "corpus": 0.6})


def test_validation_text_shorter_than_a_row_is_an_error_with_numbers(built):
    with pytest.raises(DataError, match=r"validation split of stream 'corpus': got \d+ tokens, expected at least 5001"):
        validation_rows(built.shards, "corpus", num_rows=4, seq_len=5000)


def test_shares_must_add_up_and_name_streams_that_are_there(built):
    with pytest.raises(ConfigError, match="expected shares that add up to 1"):
        make(built, shares={"corpus": 0.6, "exercises": 0.3})
    with pytest.raises(ConfigError, match=r"got 'web', expected streams of the tokens: corpus, exercises"):
        make(built, shares={"corpus": 0.6, "web": 0.4})
    assert rows(make(built, shares={"corpus": 1.0, "web": 0.0}), 0)[0][0] == "corpus"
