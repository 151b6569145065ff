from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import DataError
from lilpipe.stage import Workspace
from lilpipe.tokenizer.bpe import STAGE, train_tokenizer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.sample import Sample, Text, TokenizerShare, share_out, take_bytes
from tests.tokenizer.conftest import corpus_of


def text(group, content):
    return Text(group, group, None, content)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, []), (2, ["ab"]), (3, ["abc"]), (4, ["abc"]), (5, ["abc", "é"]), (6, ["abc", "éd"]), (9, ["abc", "éd"])],
)
def test_texts_are_taken_up_to_a_number_of_bytes_and_cut_between_characters(limit, expected):
    assert [each.text for each in take_bytes([text("s", "abc"), text("s", "éd")], {"s": limit})] == expected


def test_each_group_has_a_limit_of_its_own_and_those_without_give_nothing():
    texts = [text("a", "aaa"), text("c", "ccc"), text("b", "bbb"), text("a", "AAA"), text("b", "BBB")]
    assert [each.text for each in take_bytes(texts, {"a": 4, "b": 2})] == ["aaa", "bb", "A"]


def test_nothing_is_read_once_all_limits_are_reached():
    def texts():
        yield text("a", "aaa")
        raise AssertionError("read on")

    assert len(list(take_bytes(texts(), {"a": 3}))) == 1


def test_without_a_limit_the_scarcest_group_decides():
    shares = share_out({"a": 900, "b": 100, "c": 50}, {"a": 3, "b": 1}, None, "source")
    assert shares == {"a": TokenizerShare(0.75, 300, 900), "b": TokenizerShare(0.25, 100, 100)}


def test_with_a_limit_a_group_that_is_short_gives_what_it_has():
    shares = share_out({"a": 900, "b": 100}, {"a": 1, "b": 1}, 600, "source")
    assert {name: share.limit for name, share in shares.items()} == {"a": 300, "b": 100}


def test_a_weight_of_what_is_not_there_names_what_is():
    with pytest.raises(DataError, match=r"weights: got x, .* no document by label, expected names out of a, b"):
        share_out({"a": 1, "b": 1}, {"a": 1, "x": 1}, None, "label")


ROWS = [
    *({"source": "web", "language": "en", "label": "prose", "text": "the cat sat on the mat " * 5} for _ in range(30)),
    *({"source": "code", "language": "en", "label": "code", "text": "for i in range(10): "} for _ in range(30)),
    *({"source": "web", "language": "de", "label": "prose", "text": "die Katze saß hier "} for _ in range(30)),
]


@given(
    groups=st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=9)), max_size=30),
    weights=st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 10), min_size=1),
    max_bytes=st.none() | st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_what_is_taken_is_what_was_planned(groups, weights, max_bytes):
    available = Counter(dict.fromkeys(weights, 0))
    for group, content in groups:
        available[group] += len(content.encode())
    shares = share_out(available, weights, max_bytes, "source")
    taken = Counter()
    for each in take_bytes([text(*item) for item in groups], {name: share.limit for name, share in shares.items()}):
        taken[each.group] += len(each.text.encode())
    for name, share in shares.items():
        assert share.limit - 3 <= taken[name] <= share.limit <= available[name]  # a character has up to four bytes
    assert sum(taken.values()) <= (max_bytes or sum(available.values())) + len(shares)


@pytest.mark.parametrize(
    ("by", "weights", "source_of"),
    [
        ("source", {"web": 1, "code": 3}, lambda each: each.source),
        ("language", {"en": 3, "de": 1}, lambda each: each.language),
        ("label", {"code": 1, "prose": 1}, lambda each: "code" if each.source == "code" else "prose"),
    ],
)
def test_the_sample_has_the_proportions_asked_for(tmp_path, by, weights, source_of):
    corpus = corpus_of(tmp_path, ROWS)
    sample = Sample.plan(TokenizerConfig(weights=weights, weights_by=by), corpus.path, None)
    for max_bytes in (None, 500):
        taken = Counter()
        for each in sample.texts(max_bytes):
            taken[source_of(each)] += len(each.text.encode())
        for name, weight in weights.items():
            assert taken[name] / taken.total() == pytest.approx(weight / sum(weights.values()), abs=0.01)
    assert sample.shortages() == []


def test_without_weights_all_is_taken_as_it_comes(tmp_path):
    sample = Sample.plan(TokenizerConfig(), corpus_of(tmp_path, ROWS).path, None)
    assert [each.text for each in sample.texts()] == [row["text"] for row in ROWS]
    assert sample.num_bytes == sum(len(row["text"].encode()) for row in ROWS)


def test_a_document_without_a_language_has_no_weight(tmp_path):
    rows = [{"language": None, "text": "unknown"}, {"language": "en", "text": "known"}]
    sample = Sample.plan(
        TokenizerConfig(weights={"en": 1}, weights_by="language"), corpus_of(tmp_path, rows).path, None
    )
    assert [each.text for each in sample.texts()] == ["known"]


def test_the_stage_learns_from_what_has_weight_and_says_what_is_short(tmp_path):
    workspace = Workspace(tmp_path / "work")
    config = TokenizerConfig(vocab_size=280, weights={"code": 0.5, "web": 0.5}, max_bytes=2_400)
    metrics = STAGE.run(config, {"corpus": corpus_of(tmp_path, ROWS)}, workspace)
    assert metrics["training_bytes"] == 600 + 1_200
    assert "code: requested 1,200 bytes, but the corpus has 600" in workspace.events.read_text()
    page = (workspace.report / "report.html").read_text()
    assert "Training text by weight" in page
    assert "33.3%" in page


def test_what_has_no_weight_is_not_learnt(tmp_path):
    workspace = Workspace(tmp_path / "work")
    config = TokenizerConfig(vocab_size=270, weights={"code": 1})
    STAGE.run(config, {"corpus": corpus_of(tmp_path, ROWS)}, workspace)
    code = [row["text"] for row in ROWS if row["source"] == "code"]
    assert Tokenizer.load(workspace.output).digest == train_tokenizer(code, vocab_size=270).digest
