from collections import Counter

import numpy as np
import pytest
import tiktoken

from lilpipe.config.tokens import OtherTokenizer, TokenizerConfig
from lilpipe.errors import ConfigError
from lilpipe.stage import Workspace
from lilpipe.tokenizer import bpe
from lilpipe.tokenizer.bpe import STAGE, train_tokenizer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.sample import Text
from lilpipe.tokenizer.usage import HARDLY, NUM_NEIGHBOURS, find_suspects, measure_usage
from tests.tokenizer.conftest import PROSE, corpus_of

TEXTS = [Text("", f"s{index % 2}", ["en", "de", None][index % 3], text) for index, text in enumerate(PROSE * 3)]


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_counts_are_those_of_a_loop_over_tokens(tokenizer, monkeypatch, chunk):
    monkeypatch.setattr("lilpipe.tokenizer.usage.CHUNK_BYTES", chunk)
    usage = measure_usage(tokenizer, TEXTS)
    counts, first, last = Counter(), {}, {}
    for number, text in enumerate(TEXTS):
        for token in tokenizer.encode(text.text):
            counts[token] += 1
            first.setdefault(token, number)
            last[token] = number
    ids = range(len(tokenizer.ranks))
    assert usage.token_counts.tolist() == [counts[i] for i in ids]
    assert usage.first_document.tolist() == [first.get(i, -1) for i in ids]
    assert usage.last_document.tolist() == [last.get(i, -1) for i in ids]
    assert usage.num_documents == len(TEXTS)


def test_totals_go_by_source_and_language(tokenizer):
    usage = measure_usage(tokenizer, TEXTS)
    chosen = [text.text for text in TEXTS if text.language == "de"]
    totals = usage.by_language["de"]
    assert totals.num_bytes == sum(len(text.encode()) for text in chosen)
    assert totals.num_tokens == sum(len(tokenizer.encode(text)) for text in chosen)
    assert set(usage.by_language) == {"en", "de"}
    assert set(usage.by_source) == {"s0", "s1"}
    assert usage.total.num_bytes == sum(each.num_bytes for each in usage.by_source.values())


@pytest.mark.parametrize("text", ["", " ", "a", " a", "a ", "one two", "  one\n\ttwo  é\r\n", "日本 語"])
def test_words_are_what_stands_between_white_space(tokenizer, text):
    assert measure_usage(tokenizer, [Text("", "s", None, text)]).total.num_words == len(text.split())


def test_other_tokenizers_count_the_same_text(tokenizer):
    single = tiktoken.Encoding(
        "bytes", pat_str=".|\n|\r", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    usage = measure_usage(tokenizer, TEXTS, others={"bytes": single})
    assert usage.total.others["bytes"] == usage.total.num_bytes
    assert usage.by_source["s1"].bytes_per_token_of("bytes") == 1


# --- glitch tokens ------------------------------------------------------------------------------------------------


def names(tokenizer, ids):
    tokens = list(tokenizer.ranks)
    return {tokens[i].decode() for i in ids}


def test_steps_towards_a_longer_token_are_suspects_that_never_occur():
    texts = [Text("", "s", None, "abcdefgh xyz " * 30)] * 4
    tokenizer = train_tokenizer((text.text for text in texts), vocab_size=256 + 8 + 11)
    suspects = find_suspects(measure_usage(tokenizer, texts), 256)
    assert b"abcdefgh" in tokenizer.ranks
    assert names(tokenizer, suspects.never) == {token.decode() for token in tokenizer.ranks if len(token) > 1} - {
        "abcdefgh",
        " abcdefgh",
        " xyz",
    }
    assert suspects.hardly == suspects.one_document == []


def test_a_word_that_one_document_repeats_is_a_suspect():
    ordinary = [Text("", "s", None, "the cat sat on the mat")] * 20
    odd = Text("", "s", None, "SolidGoldMagikarp " * 50)
    texts = [*ordinary, odd]
    tokenizer = train_tokenizer((text.text for text in texts), vocab_size=256 + 8 + 26)
    suspects = find_suspects(measure_usage(tokenizer, texts), 256)
    assert " SolidGoldMagikarp" in names(tokenizer, suspects.one_document)
    assert not names(tokenizer, suspects.one_document) & {"the", " the", " cat"}


def test_a_token_far_below_its_neighbours_by_rank_hardly_occurs(tokenizer):
    usage = measure_usage(tokenizer, TEXTS)
    size = 3 * NUM_NEIGHBOURS
    usage.token_counts = np.full(256 + size, 1_000)
    usage.first_document, usage.last_document = np.zeros(256 + size, int), np.ones(256 + size, int)
    planted = [256, 256 + NUM_NEIGHBOURS, 255 + size]
    usage.token_counts[planted] = [9, 9, 10]
    assert find_suspects(usage, 256).hardly == planted[:2]
    assert HARDLY * 1_000 == 10


def test_the_tokens_of_a_base_are_no_suspects(tokenizer):
    usage = measure_usage(tokenizer, [Text("", "s", None, "nothing of it")])
    assert min(find_suspects(usage, 300).never) >= 300


# --- the report ---------------------------------------------------------------------------------------------------


def run_stage(tmp_path, **values):
    rows = [{"source": text.source, "language": text.language, "text": text.text} for text in TEXTS]
    workspace = Workspace(tmp_path / "work")
    metrics = STAGE.run(TokenizerConfig(**values), {"corpus": corpus_of(tmp_path / "corpus", rows)}, workspace)
    return metrics, (workspace.report / "report.html").read_text(), Tokenizer.load(workspace.output)


def test_the_report_compares_with_the_tokenizers_that_are_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save_tiktoken(tmp_path / "x.tiktoken")
    compare = {
        "same": OtherTokenizer(path=str(tmp_path)),
        "merges <3": OtherTokenizer(path=str(tmp_path / "x.tiktoken"), pattern="gpt2"),
    }
    metrics, page, ours = run_stage(tmp_path, vocab_size=380, compare=compare)
    num_bytes = sum(len(text.encode()) for text in PROSE)
    assert metrics["bytes_per_token_of_same"] == num_bytes / sum(len(tokenizer.encode(text)) for text in PROSE)
    assert metrics["bytes_per_token"] == num_bytes / sum(len(ours.encode(text)) for text in PROSE)
    assert "bytes per token, same" in page
    assert "merges &lt;3" in page
    assert "<svg" in page


def test_metrics_name_sources_and_languages(tmp_path):
    metrics, page, _ = run_stage(tmp_path, vocab_size=380)
    assert {"bytes_per_token_s0", "bytes_per_token_s1", "bytes_per_token_language_de"} <= metrics.keys()
    assert metrics["tokens_per_word"] > 1
    assert 0 < metrics["unused_ratio"] < 1
    assert "Glitch-token suspects" in page
    assert "Training text by weight" not in page
    assert "nan" not in page.split("<svg")[0]


def test_only_the_largest_sources_have_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "MAX_METRICS", 1)
    metrics, page, _ = run_stage(tmp_path, vocab_size=380)
    assert [name for name in metrics if name.startswith("bytes_per_token_")] == [
        "bytes_per_token_s1",
        "bytes_per_token_language_de",
    ]
    assert "s0" in page


def test_the_same_inputs_give_the_same_page(tmp_path):
    assert run_stage(tmp_path / "a", vocab_size=380)[1] == run_stage(tmp_path / "b", vocab_size=380)[1]


def test_a_tokenizer_to_compare_with_needs_a_pattern(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"pattern: got none, but .*x\.tiktoken does not contain it"):
        OtherTokenizer(path=str(tmp_path / "x.tiktoken"))
    tokenizer.save_tiktoken(tmp_path / "ranks")
    with pytest.raises(ConfigError, match=r"tokenizer\.compare\.other\.pattern: got none"):
        run_stage(tmp_path, vocab_size=380, compare={"other": OtherTokenizer(path=str(tmp_path / "ranks"))})
