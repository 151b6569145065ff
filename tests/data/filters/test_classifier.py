import dataclasses
import hashlib
import itertools
import json
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.config.corpus import ClassifierConfig
from lilpipe.config.sources import Source
from lilpipe.data.filters.chain import Bounds, Document
from lilpipe.data.filters.classifier import (
    MODEL_FILE,
    ClassifierFilter,
    area_under_curve,
    at_threshold,
    features,
    keep_threshold,
    probability,
    train_classifier,
)
from lilpipe.data.filters.fasttext_model import load
from lilpipe.errors import ConfigError, DataError
from tests.data.prose import prose

EXAMPLES = (Source(kind="text", name="any", path="."),)


def config(**settings):
    chosen = {"min_score": 0.5, "validation_ratio": 0.3, "dimension": 8, "learning_rate": 0.5} | settings
    return ClassifierConfig(good=EXAMPLES, bad=EXAMPLES, **chosen)


ADVERT_WORDS = ("buy", "now", "cheap", "pills", "casino", "bonus", "click", "here", "free", "winner", "offer", "price")


def advert(seed):
    draw = random.Random(seed)
    return " ".join(draw.choices(ADVERT_WORDS, k=40))


GOOD, BAD = [prose(seed) for seed in range(120)], [advert(seed) for seed in range(90)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, train_classifier(iter(GOOD), iter(BAD), config(), folder)


def score(folder, text):
    document = Document(id="d", text=text, source="s")
    assert ClassifierFilter(folder / MODEL_FILE)(document) is None
    return document.scores["classifier.score"]


def test_texts_never_seen_are_told_apart_and_only_noted(trained):
    folder, _ = trained
    assert all(score(folder, prose(seed)) > 0.8 for seed in range(1_000, 1_010))
    assert all(score(folder, advert(seed)) < 0.2 for seed in range(1_000, 1_010))
    assert dict(ClassifierFilter(folder / MODEL_FILE).bounds) == {"score": Bounds()}


def test_the_report_says_what_was_learnt_from_and_how_well(trained):
    _, report = trained
    assert (report.num_good, report.num_bad, report.num_in_both) == (120, 90, 0)
    assert 50 <= report.num_trained <= 75
    assert 15 <= report.num_validation <= 40
    assert report.auc > 0.99
    by_threshold = {each.min_score: each for each in report.at_thresholds}
    assert by_threshold[0.5] == (0.5, 1, 1, 1)
    assert list(by_threshold) == sorted(by_threshold)
    assert [each.recall for each in report.at_thresholds] == sorted(
        (x.recall for x in report.at_thresholds), reverse=True
    )
    assert json.loads(json.dumps(dataclasses.asdict(report)))["num_good"] == 120


def test_the_user_s_threshold_is_among_those_measured(tmp_path):
    report = train_classifier(GOOD, BAD, config(min_score=0.123), tmp_path)
    assert 0.123 in [each.min_score for each in report.at_thresholds]


def test_labels_that_mean_nothing_are_not_learnt(tmp_path):
    texts = [prose(seed) for seed in range(300)]
    report = train_classifier(texts[::2], texts[1::2], config(), tmp_path)
    assert abs(report.auc - 0.5) < 0.2


def test_nothing_but_the_model_is_left(trained):
    folder, _ = trained
    assert [path.name for path in folder.iterdir()] == [MODEL_FILE]


def test_order_and_repetition_of_the_examples_change_no_byte(tmp_path, trained):
    folder, report = trained
    shuffled = random.Random(1).sample(GOOD * 2, 240)
    assert train_classifier(shuffled, BAD[::-1] + BAD[:5], config(), tmp_path) == report
    assert (tmp_path / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()


def test_what_lies_in_freed_memory_does_not_reach_the_model(tmp_path, trained):
    folder, _ = trained
    freed = [np.full(size, np.nan, np.float32) for size in (1_000, 5_000, 8_000, 20_000, 34_000) * 5]
    del freed
    train_classifier(GOOD, BAD, config(), tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()


def test_another_process_trains_the_same_bytes(tmp_path, trained):
    folder, _ = trained
    code = (
        "from pathlib import Path; from tests.data.filters.test_classifier import *; import sys;"
        "train_classifier(GOOD, BAD, config(), Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    digests = [hashlib.sha256((path / MODEL_FILE).read_bytes()).hexdigest() for path in (folder, tmp_path)]
    assert digests[0] == digests[1]


def test_held_out_examples_are_not_learnt_from(tmp_path):
    """Words that occur in one example each must be unknown to the model for just those held out."""
    good = [f"unique{i} river lantern meadow" for i in range(100)]
    bad = [f"special{i} casino bonus click" for i in range(100)]
    report = train_classifier(good, bad, config(), tmp_path)
    words = set(load(tmp_path / MODEL_FILE, "x").get_words())
    learnt = [sum(f"{name}{i}" in words for i in range(100)) for name in ("unique", "special")]
    assert learnt == [report.num_trained] * 2
    assert report.num_validation <= 100 - report.num_trained


def test_classes_are_balanced_in_training_and_in_measuring(tmp_path):
    report = train_classifier(
        [f"good number {i}" for i in range(1_000)], [f"bad number {i}" for i in range(60)], config(), tmp_path
    )
    assert report.num_trained + report.num_validation == 60
    labels = load(tmp_path / MODEL_FILE, "x").get_labels(include_freq=True)
    assert set(labels[1].tolist()) == {report.num_trained}


def test_texts_in_both_classes_and_empty_ones_are_left_out(tmp_path):
    report = train_classifier([*GOOD, BAD[0], "", " \n"], [*BAD, GOOD[0].upper(), "\t"], config(), tmp_path)
    assert (report.num_good, report.num_bad, report.num_in_both) == (119, 89, 2)


def test_too_few_examples_are_told_with_how_many_are_needed(tmp_path):
    with pytest.raises(DataError, match=r"got \d\d good and [0-7] bad examples for training, expected at least 20"):
        train_classifier(GOOD, BAD[:7], config(), tmp_path)
    with pytest.raises(DataError, match=r"got 0 good and 0 bad examples for training"):
        train_classifier([], [], config(), tmp_path)
    with pytest.raises(DataError, match=r"examples for validation \(a share of 0.001\), expected at least 5 of each"):
        train_classifier(GOOD, BAD, config(validation_ratio=0.001), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_that_diverges_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus.classifier.learning_rate: got 1e\+30.*; lower it"):
        train_classifier(GOOD, BAD, config(learning_rate=1e30), tmp_path)


@pytest.mark.parametrize("text", ["", " ", "\0", "__label__bad", "\ud800", "</s>", "x" * 100_000])
def test_any_text_gets_a_probability(trained, text):
    assert 0 <= score(trained[0], text) <= 1


def test_labels_in_a_text_do_not_decide_its_class(tmp_path):
    good = [f"__label__bad {text} __label__bad" for text in GOOD]
    assert train_classifier(good, BAD, config(), tmp_path).auc > 0.99
    assert set(load(tmp_path / MODEL_FILE, "x").get_labels()) == {"__label__good", "__label__bad"}


@given(st.text())
def test_features_are_one_line_of_lower_case_words_with_marks_apart(text):
    line = features(text)
    assert line.split() == line.split(" ") or not line
    assert not any(mark in word and len(word) > 1 for word in line.split() for mark in ".,!?;:\"()'`-/=")
    assert features(line) == line
    bare = "".join(text.encode(errors="replace").decode().lower().replace("__label__", "label").split())
    assert line.replace(" ", "") == bare


def test_the_filter_s_score_is_fasttext_s_own(trained):
    folder, _ = trained
    model = load(folder / MODEL_FILE, "x")
    for text in (prose(5), advert(5), "river casino"):
        labels, scores = model.predict(features(text), k=2)
        expected = dict(zip(map(str, labels), scores, strict=True))["__label__good"]
        assert probability(model, text) == pytest.approx(expected, abs=1e-6)


def test_the_filter_travels_to_other_processes(trained):
    folder, _ = trained
    copy = pickle.loads(pickle.dumps(ClassifierFilter(folder / MODEL_FILE)))
    document = Document(id="d", text=prose(3), source="s")
    copy(document)
    assert document.scores["classifier.score"] == score(folder, prose(3))


def test_a_damaged_model_is_told(trained, tmp_path):
    whole = (trained[0] / MODEL_FILE).read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"corpus.classifier: .*cut.bin has {len(whole) - 1} bytes"):
        ClassifierFilter(tmp_path / "cut.bin")(Document(id="d", text="x", source="s"))


SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


@given(SCORES, SCORES, st.floats(0, 1))
def test_precision_recall_f1_and_auc_are_what_counting_pairs_gives(good, bad, min_score):
    wins = sum((g > b) + 0.5 * (g == b) for g, b in itertools.product(good, bad))
    assert area_under_curve(np.sort(good), np.sort(bad)) == pytest.approx(wins / len(good) / len(bad))
    found = at_threshold(np.array(good), np.array(bad), min_score)
    hits, false = sum(g >= min_score for g in good), sum(b >= min_score for b in bad)
    assert found.recall == pytest.approx(hits / len(good))
    assert found.precision == (None if hits + false == 0 else pytest.approx(hits / (hits + false)))
    if hits and found.precision:
        assert found.f1 == pytest.approx(2 / (1 / found.recall + 1 / found.precision))
    else:
        assert found.f1 == 0


@given(SCORES, st.integers(1, 100))
def test_the_kept_share_is_reached_by_the_greatest_score_that_reaches_it(scores, percent):
    scores, wanted = np.array(scores, np.float32), math.ceil(len(scores) * percent / 100)
    threshold = keep_threshold(scores, percent / 100)
    assert np.float32(threshold) in scores
    assert (scores >= np.float32(threshold)).sum() >= wanted
    assert (scores > np.float32(threshold)).sum() < wanted


@given(SCORES, st.integers(1, 100))
def test_a_histogram_gives_the_threshold_of_the_scores_in_it(scores, percent):
    rounded = np.floor(np.array(scores) * 8) / 8
    counts, edges = np.histogram(rounded, bins=9, range=(0, 9 / 8))
    assert keep_threshold(edges[:-1], percent / 100, counts=counts) == keep_threshold(rounded, percent / 100)


def test_no_documents_have_a_threshold_that_keeps_all():
    assert keep_threshold(np.array([]), 0.5) == 0
    assert keep_threshold(np.array([0.5]), 0.5, counts=np.array([0])) == 0
