import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lilpipe.config.corpus import MinhashConfig
from lilpipe.data import minhash, signatures
from lilpipe.data.minhash import PAIR, MatchBands, compare_buckets, near_duplicates
from lilpipe.data.signatures import Signatures, SignatureWriter
from tests.data.prose import change_words, jaccard, prose, words

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONFIG = MinhashConfig()


def write(folder, shards, config=CONFIG, scores=None):
    """Sign shards of texts; a score for each text if any."""
    for rank, texts in enumerate(shards):
        with SignatureWriter(folder, rank, config) as writer:
            for text in texts:
                score = scores[text] if scores else None
                writer.add(words(text), num_bytes=len(text.encode()), score=score)


def match(folder, shards, config=CONFIG, scores=None, **options):
    """Each dropped place, the place that stays for it, and their similarity."""
    write(folder / "signatures", shards, config, scores)
    for band in range(config.num_buckets):
        MatchBands(config, folder / "signatures", folder / "pairs").run(None, band, config.num_buckets)
    return rows(near_duplicates(folder / "signatures", folder / "pairs", config, **options))


def rows(table):
    return {(each["shard"], each["row"]): tuple(each.values())[2:] for each in table.to_pylist()}


def recall_and_precision(folder, originals, draw, config=CONFIG):
    """Of finding copies with 5 % of the words changed, in two shuffled shards."""
    vocabulary = re.findall(r"\w+", " ".join(originals[:200]))
    texts = [*enumerate(originals), *((n, change_words(t, 0.05, draw, vocabulary)) for n, t in enumerate(originals))]
    draw.shuffle(texts)
    shards = texts[: len(originals)], texts[len(originals) :]
    found = match(folder, [[text for _, text in shard] for shard in shards], config)
    right = sum(shards[s][r][0] == shards[kept_s][kept_r][0] for (s, r), (kept_s, kept_r, _) in found.items())
    return right / len(originals), right / max(1, len(found))


# --- what is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentences", [6, 12])
def test_copies_with_a_twentieth_of_the_words_changed_are_found_and_little_else(tmp_path, sentences):
    originals = [prose(seed, sentences) for seed in range(500)]
    recall, precision = recall_and_precision(tmp_path, originals, random.Random(sentences))
    assert recall >= 0.95
    assert precision >= 0.98


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_changed_copies_of_real_documents_are_found_and_little_else(tmp_path):
    with gzip.open(SHARED / "rust-rfcs.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:4_000] for _, line in zip(range(300), file, strict=False)]
    recall, precision = recall_and_precision(tmp_path, texts, random.Random(0))
    assert recall >= 0.95
    assert precision >= 0.98


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_editions_of_a_book_are_matched_as_exact_jaccard_has_it(tmp_path):
    with gzip.open(SHARED / "rust-book.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [" ".join(re.findall(r"\w+", json.loads(line)["text"].lower())) for line in file]
    texts = [text for text in texts if len(text.split()) >= CONFIG.ngram_size][:150]
    found = match(tmp_path, [texts])
    exact = [jaccard(texts[row], texts[kept]) for (_, row), (_, kept, _) in found.items()]
    estimates = [similarity for _, _, similarity in found.values()]
    assert len(found) > 20
    assert min(exact) > CONFIG.min_similarity - 0.15
    assert np.abs(np.subtract(exact, estimates)).max() < 0.2
    stays = [row for row in range(len(texts)) if (0, row) not in found]
    left = max(jaccard(texts[a], texts[b]) for n, a in enumerate(stays) for b in stays[:n])
    assert left < CONFIG.min_similarity + 0.15


def test_candidates_are_taken_unverified_only_where_min_similarity_is_zero(tmp_path):
    draw = random.Random(0)
    texts = [prose(seed, 12) for seed in range(40)]
    texts += [change_words(text, 0.2, draw, texts[0].split()) for text in texts]
    loose = MinhashConfig(num_buckets=64, hashes_per_bucket=1, min_similarity=0)
    assert match(tmp_path / "loose", [texts], loose)
    assert not match(tmp_path / "strict", [texts], loose.model_copy(update={"min_similarity": 0.8}))


def test_texts_shorter_than_an_n_gram_match_as_a_whole_and_those_without_words_never(tmp_path):
    texts = ["two words", "", "Two words!", "two", "", "two words more", "…", "words two"]
    assert match(tmp_path, [texts]) == {(0, 0): (0, 2, 1.0)}  # the longer by a byte stays


# --- what stays ---------------------------------------------------------------------------------------------------

LEFT, MIDDLE, RIGHT = (" ".join(f"w{n}" for n in range(start, start + 100)) for start in (100, 130, 160))
"""The middle one is similar to both others (0.52), and they to each other much less (0.23)."""


def test_the_best_stays_by_score_then_length_then_order(tmp_path):
    text = prose(0)
    texts = [text, text + "!", text.upper()]
    assert match(tmp_path / "order", [[text, text.upper()], [text]]) == {(0, 1): (0, 0, 1.0), (1, 0): (0, 0, 1.0)}
    assert match(tmp_path / "length", [texts]) == {(0, 0): (0, 1, 1.0), (0, 2): (0, 1, 1.0)}
    scores = dict(zip(texts, (0.2, 0.1, 0.3), strict=True))
    assert match(tmp_path / "score", [texts], scores=scores) == {(0, 0): (0, 2, 1.0), (0, 1): (0, 2, 1.0)}


def test_of_a_chain_both_ends_stay_unless_the_middle_is_the_best(tmp_path):
    texts = [LEFT, MIDDLE, RIGHT]
    ends = match(tmp_path / "ends", [texts], scores={LEFT: 0.9, MIDDLE: 0.5, RIGHT: 0.1})
    assert [(place, kept[:2]) for place, kept in ends.items()] == [((0, 1), (0, 0))]
    middle = match(tmp_path / "middle", [texts], scores={LEFT: 0.5, MIDDLE: 0.9, RIGHT: 0.1})
    assert [(place, kept[:2]) for place, kept in middle.items()] == [((0, 0), (0, 1)), ((0, 2), (0, 1))]


def test_the_most_similar_of_those_that_stay_is_named(tmp_path):
    near_right = " ".join(f"w{n}" for n in range(140, 240))
    scores = {LEFT: 0.9, RIGHT: 0.8, near_right: 0.1}
    found = match(tmp_path, [[near_right, LEFT, RIGHT]], MinhashConfig(min_similarity=0.3), scores)
    assert [(place, kept[:2]) for place, kept in found.items()] == [((0, 0), (0, 2))]
    assert found[0, 0][2] == pytest.approx(jaccard(near_right, RIGHT), abs=0.15)


def test_documents_below_a_score_are_left_out(tmp_path):
    texts = [LEFT, MIDDLE, MIDDLE + "!"]
    scores = dict(zip(texts, (0.9, 0.3, 0.6), strict=True))
    assert set(match(tmp_path / "all", [texts], scores=scores)) == {(0, 1), (0, 2)}
    assert set(match(tmp_path / "some", [texts], scores=scores, min_score=0.5)) == {(0, 2)}
    assert match(tmp_path / "one", [texts], scores=scores, min_score=0.7) == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_document_goes_if_and_only_if_it_pairs_with_one_that_stays(seed):
    draw = np.random.default_rng(seed)
    edges = np.sort(draw.integers(0, 60, (40 * (seed + 1), 2)), axis=1)
    edges = edges[edges[:, 0] < edges[:, 1]]
    kept = minhash._greedy(edges[:, 0], edges[:, 1], 60)
    for document in range(60):
        assert kept[document] == (not any(kept[better] for better, worse in edges if worse == document))


# --- files and tasks ----------------------------------------------------------------------------------------------


def copies(count=60):
    draw = random.Random(1)
    texts = [prose(seed % (count // 3), 8) for seed in range(count)]
    return [change_words(text, draw.choice([0, 0.03]), draw, texts[0].split()) for text in texts]


def test_what_goes_depends_neither_on_the_cut_into_shards_nor_on_when_they_are_written(tmp_path):
    texts = copies()
    whole = match(tmp_path / "whole", [texts])
    assert len(whole) > 20
    cut = match(tmp_path / "cut", [texts[:7], [], texts[7:40], texts[40:]])
    starts = [0, 7, 7, 40]
    assert {starts[s] + r: (starts[ks] + kr, x) for (s, r), (ks, kr, x) in cut.items()} == {
        row: (kept, similarity) for (_, row), (_, kept, similarity) in whole.items()
    }
    for rank, texts_of_shard in reversed(list(enumerate([texts[:7], [], texts[7:40], texts[40:]]))):
        with SignatureWriter(tmp_path / "late", rank, CONFIG) as writer:
            for text in texts_of_shard:
                writer.add(words(text), num_bytes=len(text.encode()))
    for path in sorted((tmp_path / "cut" / "signatures").iterdir()):
        assert (tmp_path / "late" / path.name).read_bytes() == path.read_bytes()


def test_ranges_of_a_band_give_the_same_pairs(tmp_path, monkeypatch):
    texts = copies()
    whole = match(tmp_path / "whole", [texts[:30], texts[30:]])
    monkeypatch.setattr(signatures, "BAND_DOCUMENTS", 7)
    monkeypatch.setattr(signatures, "COMPARED_AT_ONCE", 3)
    assert match(tmp_path / "ranges", [texts[:30], texts[30:]]) == whole


def test_a_task_done_again_gives_the_same_bytes_and_a_broken_one_leaves_none(tmp_path, monkeypatch):
    found = match(tmp_path, [copies()])
    band = tmp_path / "pairs" / "00003.npy"
    before = band.read_bytes()
    step = MatchBands(CONFIG, tmp_path / "signatures", tmp_path / "pairs")
    band.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(signatures.os, "fsync", broken)
        with pytest.raises(OSError, match="planted"):
            step.run(None, 3, CONFIG.num_buckets)
    assert not band.exists()
    step.run(None, 3, CONFIG.num_buckets)
    assert band.read_bytes() == before
    assert rows(near_duplicates(tmp_path / "signatures", tmp_path / "pairs", CONFIG)) == found


def broken(*_):
    raise OSError("planted")


@pytest.mark.parametrize("shards", [[], [[]], [[], ["", "…"], []], [["one single document"], []]])
def test_where_there_is_nothing_to_find_nothing_is_found(tmp_path, shards):
    (tmp_path / "signatures").mkdir()
    assert match(tmp_path, shards) == {}


# --- big buckets --------------------------------------------------------------------------------------------------


def compared(monkeypatch):
    """A list that takes the number of signatures compared in each call."""
    counts, agreeing = [], Signatures.agreeing
    monkeypatch.setattr(Signatures, "agreeing", lambda self, a, b: counts.append(len(a)) or agreeing(self, a, b))
    return counts


def test_a_bucket_of_equal_documents_takes_one_comparison_each(tmp_path, monkeypatch):
    counts = compared(monkeypatch)
    config = MinhashConfig(num_buckets=4)
    found = match(tmp_path, [["the very same text again and again"] * 500] * 2, config)
    assert len(found) == 999
    assert set(found.values()) == {(0, 0, 1.0)}
    assert sum(counts) == 4 * 999


def test_a_bucket_of_documents_that_have_little_in_common_stays_linear(tmp_path, monkeypatch):
    write(tmp_path, [[prose(seed) for seed in range(300)]])
    counts = compared(monkeypatch)
    found = Signatures(tmp_path, CONFIG)
    pairs = compare_buckets(found, np.zeros(300, np.int64), np.arange(300), CONFIG)
    assert (pairs.dtype, len(pairs)) == (PAIR, 0)
    assert sum(counts) <= minhash.NUM_LEADERS * 300


def test_in_a_big_bucket_all_of_as_many_groups_as_leaders_are_found(tmp_path):
    draw = random.Random(0)
    texts = [prose(group, 12) for group in range(minhash.NUM_LEADERS) for _ in range(8)]
    texts = [change_words(text, 0.01, draw, texts[0].split()) for text in texts]
    write(tmp_path, [texts])
    everything = np.arange(len(texts))
    pairs = compare_buckets(Signatures(tmp_path, CONFIG), np.zeros(len(texts), np.int64), everything, CONFIG)
    assert len(np.unique(pairs["worse"])) == len(texts) - minhash.NUM_LEADERS
    assert (pairs["better"] // 8 == pairs["worse"] // 8).all()


def test_in_a_small_bucket_all_are_compared_with_all(tmp_path):
    texts = ["the very same text again and again"] * (minhash.NUM_LEADERS + 1)
    write(tmp_path, [texts])
    everything = np.arange(len(texts))
    pairs = compare_buckets(Signatures(tmp_path, CONFIG), np.ones(len(texts), np.int64), everything, CONFIG)
    assert len(pairs) == len(texts) * (len(texts) - 1) // 2
