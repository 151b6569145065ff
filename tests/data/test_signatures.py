import random
import re
import tracemalloc

import numpy as np
import pytest

from lilpipe.config.corpus import MinhashConfig
from lilpipe.data import signatures as module
from lilpipe.data.signatures import Signatures, SignatureWriter, band_hashes, signatures
from lilpipe.errors import DataError
from tests.data.prose import change_words, jaccard, prose, words

CONFIG = MinhashConfig()


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_the_estimate_is_unbiased_and_as_exact_as_its_number_of_independent_hashes_makes_it(similarity):
    draw = np.random.default_rng(0)
    common, own = round(200 * similarity), round(200 * (1 - similarity) / 2)
    config = MinhashConfig(ngram_size=1, num_buckets=16, hashes_per_bucket=4)
    estimates, candidates = [], 0
    for seed in range(300):
        numbers = draw.integers(0, 2**64, common + 2 * own, np.uint64)
        a, b = numbers[: common + own], np.append(numbers[:common], numbers[common + own :])
        values = signatures([a, b], config.model_copy(update={"seed": seed}))
        estimates.append((values[0] == values[1]).mean())
        bands = band_hashes(values, config)
        candidates += (bands[:, 0] == bands[:, 1]).any()
    exact = common / (common + 2 * own)
    deviation = (exact * (1 - exact) / 64) ** 0.5
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * deviation / 300**0.5)
    assert np.std(estimates) == pytest.approx(deviation, rel=0.2)
    meet = 1 - (1 - exact**4) ** 16  # Indyk and Motwani
    assert candidates / 300 == pytest.approx(meet, abs=4 * (meet * (1 - meet) / 300) ** 0.5 + 1e-3)


def test_estimates_agree_with_exact_jaccard_of_word_n_grams():
    draw = random.Random(0)
    errors = []
    for seed in range(60):
        text = re.sub(r"[^\w\s]", "", prose(seed, 12)).lower()
        other = change_words(text, draw.choice([0, 0.02, 0.05, 0.2, 0.5]), draw, text.split())
        a, b = signatures([words(text), words(other)], CONFIG)
        errors.append((a == b).mean() - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.max(np.abs(errors)) < 0.2


def test_a_signature_depends_neither_on_neighbours_nor_on_how_the_work_is_sliced(monkeypatch):
    texts = [words(prose(seed)) for seed in range(5)]
    texts[1:1] = [words(""), words("two words"), words("")]
    together = signatures(texts, CONFIG)
    for size in (1, 7, 100):
        monkeypatch.setattr(module, "SLICE_WORDS", size)
        assert (signatures(texts, CONFIG) == together).all()
    for text, values in zip(texts, together, strict=True):
        assert (signatures([text], CONFIG)[0] == values).all()


def test_repetition_leaves_a_signature_and_another_order_of_words_does_not():
    once, reordered = words("a b c d e f g a b c d e f"), words("g f e d c b a")
    values = signatures([once, words("a b c d e f g a b c d e f g a b c d e f"), reordered], CONFIG)
    assert (values[0] == values[1]).all()
    assert (values[0] != values[2]).all()


def test_signatures_are_the_same_on_every_machine():
    config = MinhashConfig(num_buckets=2, hashes_per_bucket=2)
    values = signatures([np.arange(1, 9, dtype=np.uint64) << np.uint64(40)], config)
    assert values.tolist() == [[453545982, 681313130, 1910246560, 1399369133]]
    assert band_hashes(values, config).T.tolist() == [[16739087492597926160, 954201340283424943]]


def test_memory_for_a_huge_document_is_a_few_times_its_words_whatever_the_number_of_hashes():
    huge = np.random.default_rng(0).integers(0, 2**64, 1_000_000, np.uint64)
    tracemalloc.start()
    try:
        signatures([huge], MinhashConfig(num_buckets=4, hashes_per_bucket=2))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * huge.nbytes


# --- files ---


def test_a_writer_that_fails_leaves_no_files(tmp_path):
    def write_and_break():
        with SignatureWriter(tmp_path, 0, CONFIG) as writer:
            writer.add(words("a b c"), num_bytes=5)
            raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        write_and_break()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_and_one_of_other_settings_are_named(tmp_path):
    with SignatureWriter(tmp_path, 0, CONFIG) as writer:
        writer.add(words(prose(0)), num_bytes=100)
    with pytest.raises(DataError, match=r"00000\.signatures: got \d+ bytes, expected a multiple of"):
        Signatures(tmp_path, MinhashConfig(num_buckets=7, hashes_per_bucket=3))
    with (tmp_path / "00000.signatures").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="damaged"):
        Signatures(tmp_path, CONFIG)
