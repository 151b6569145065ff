import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.tokens import packing as module
from lilpipe.tokens.packing import BestFit, Concat, best_fit

MANY = settings(max_examples=100, deadline=None)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def offsets(lengths):
    return np.cumsum([0, *lengths])


def rows_of(packed):
    """By row: (document, start, stop, follows) of each piece, asked for in one call."""
    pieces = packed.pieces(np.arange(packed.num_rows))
    rows = [[] for _ in range(packed.num_rows)]
    for row, *piece in zip(*(column.tolist() for column in pieces), strict=True):
        rows[row].append(tuple(piece))
    return rows


def check_agrees_row_by_row(packed, lengths):
    """Any subset of rows, and the rows of any document, are what all rows together say."""
    rows = rows_of(packed)
    for row in range(packed.num_rows):
        pieces = packed.pieces(np.array([row]))
        assert [tuple(piece[1:]) for piece in zip(*(c.tolist() for c in pieces), strict=True)] == rows[row]
    for document in range(len(lengths)):
        expected = [row for row, pieces in enumerate(rows) if document in {piece[0] for piece in pieces}]
        assert packed.rows_of(document).tolist() == expected


@given(LENGTHS, st.integers(1, 16), st.data())
@MANY
def test_windows_are_slices_of_the_documents_end_to_end(lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    packed = Concat(offsets(lengths), seq_len=seq_len, stride=stride)
    owners = [document for document, length in enumerate(lengths) for _ in range(length)]
    starts = range(0, len(owners) - seq_len, stride)
    assert packed.num_rows == len(starts)
    assert packed.num_targets == len(starts) * seq_len
    for start, pieces in zip(starts, rows_of(packed), strict=True):
        expected = list(enumerate(owners[start : start + seq_len + 1], start))
        assert [(token, document) for document, a, b, _ in pieces for token in range(a, b)] == [
            (token, document) for token, document in expected
        ]
        assert all(follows for *_, follows in pieces)
        assert len({document for document, *_ in pieces}) == len(pieces)
    check_agrees_row_by_row(packed, lengths)


def naive_best_fit(lengths, capacity):
    """Each piece, longest first, into the row with the least space that holds it; of several, the one filled last."""
    spaces, filled, placed = [], [], [0] * len(lengths)
    for clock, piece in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        fitting = [row for row, space in enumerate(spaces) if space >= lengths[piece]]
        if not fitting:
            spaces.append(capacity)
            filled.append(clock)
            fitting = [len(spaces) - 1]
        row = min(fitting, key=lambda each: (spaces[each], -filled[each]))
        spaces[row] -= lengths[piece]
        filled[row] = clock
        placed[piece] = row
    return placed


@given(LENGTHS, st.integers(40, 100))
@MANY
def test_best_fit_is_the_naive_one(lengths, capacity):
    assert best_fit(np.array(lengths), capacity=capacity).tolist() == naive_best_fit(lengths, capacity)


def test_best_fit_by_hand():
    # 6 and 4 fill a row; so do 5, 3 and 2. First fit would put the 3 beside the 6.
    assert best_fit(np.array([3, 6, 5, 4, 2]), capacity=10).tolist() == [1, 0, 1, 0, 1]


@given(LENGTHS, st.integers(1, 16))
@MANY
def test_of_each_document_every_token_but_the_first_is_a_target_once(lengths, seq_len):
    bounds = offsets(lengths)
    packed = BestFit(bounds, seq_len=seq_len)
    rows = rows_of(packed)
    targets = []
    joined = 0
    for pieces in rows:
        assert 1 <= sum(stop - start for _, start, stop, _ in pieces) <= seq_len + 1
        for index, (document, start, stop, follows) in enumerate(pieces):
            assert bounds[document] <= start < stop <= bounds[document + 1]
            targets += range(start + 1, stop)
            before = pieces[index - 1] if index else None
            whole_before = before is not None and before[2] == bounds[before[0] + 1]
            assert follows == (whole_before and start == bounds[document])
            joined += follows
    firsts = set(bounds[:-1].tolist())
    assert sorted(targets) == [token for token in range(bounds[-1]) if token not in firsts]
    assert packed.num_targets == len(targets) + joined
    check_agrees_row_by_row(packed, lengths)


@given(LENGTHS, st.integers(1, 16))
@MANY
def test_a_document_is_cut_only_where_it_is_longer_than_a_row(lengths, seq_len):
    for pieces in rows_of(BestFit(offsets(lengths), seq_len=seq_len)):
        for document, start, stop, _ in pieces:
            assert stop - start == min(lengths[document], seq_len + 1) or lengths[document] > seq_len + 1


def test_best_fit_leaves_less_unused_than_a_row_for_each_document():
    lengths = np.random.default_rng(0).integers(1, 65, size=5000)
    packed = BestFit(offsets(lengths), seq_len=63)
    assert packed.num_rows * 64 < lengths.sum() * 1.01


@pytest.mark.parametrize("limits", [(3, 10**6), (10**6, 2)])
def test_windows_of_documents_are_packed_one_by_one(monkeypatch, limits):
    monkeypatch.setattr(module, "WINDOW_DOCUMENTS", limits[0])
    monkeypatch.setattr(module, "WINDOW_ROWS", limits[1])
    lengths = [5, 3, 9, 2, 2, 30, 4, 1, 1, 1, 7]
    packed = BestFit(offsets(lengths), seq_len=8)
    together = [{document for document, *_ in pieces} for pieces in rows_of(packed)]
    assert sorted(set().union(*together)) == list(range(len(lengths)))
    window = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3} if limits[0] == 3 else None
    if window:
        assert all(len({window[document] for document in documents}) == 1 for documents in together)
    else:  # 16 tokens fill two rows
        assert all(max(documents) - min(documents) < 5 for documents in together)
    check_agrees_row_by_row(packed, lengths)
