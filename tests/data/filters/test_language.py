import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
from fasttext.FastText import _FastText, train_unsupervised

from lilpipe.config.corpus import LanguageConfig
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.fasttext_model import stated_size
from lilpipe.data.filters.language import LanguageFilter, bundled_model_path, identify, spread
from lilpipe.errors import ConfigError, DataError
from tests.data.prose import prose

SHARED = Path(__file__).parents[4] / "shared" / "data"
GERMAN = (
    "Der alte Fischer trug den schweren Korb durch das ruhige Dorf, weil der Weg zum Hafen gesperrt war. "
    "Die Kinder sangen, und niemand wunderte sich über den frühen Winter in diesem Jahr."
)
FRENCH = "Le vieux pêcheur portait un lourd panier à travers le village, car la route du port était fermée ce jour-là."
CODE = "def f(x): return self.x[i] " * 12


def whole_text(text):
    """The oracle: fastText's own call on the whole text."""
    return predict(_FastText(str(bundled_model_path())), text)


def predict(model, text):
    labels, scores = model.predict(" ".join(text.split()))
    return labels[0].removeprefix("__label__"), scores[0]


def judge(text, languages=("en",), source="s", by_source=None, **config):
    document = Document(id="d", text=text, source=source)
    return LanguageFilter(LanguageConfig(**config), languages, by_source or {})(document), document


@pytest.mark.parametrize(("text", "language"), [(prose(1), "en"), (GERMAN, "de"), (FRENCH, "fr")])
def test_text_is_identified_as_by_fasttext_itself(text, language):
    assert identify(text) == pytest.approx(whole_text(text), abs=1e-6)
    assert identify(text)[0] == language


def test_language_and_score_are_noted_whether_the_document_is_kept_or_not():
    for text, language in [(prose(1), "en"), (GERMAN, "de")]:
        _, document = judge(text)
        assert document.language == language
        assert document.language_score == document.scores["language.score"] == identify(text)[1]


def test_documents_in_other_languages_and_doubtful_ones_go_with_the_language_as_detail():
    assert judge(prose(1))[0] is None
    assert judge(GERMAN)[0] == ("other_language", "de")
    assert judge(CODE)[0] == ("unsure_language", "en")


def test_no_languages_at_all_keep_any():
    assert judge(GERMAN, languages=())[0] is None


def test_a_source_may_name_its_own_languages():
    by_source = {"wiki": ("de", "fr"), "any": ()}
    assert judge(GERMAN, source="wiki", by_source=by_source)[0] is None
    assert judge(prose(1), source="wiki", by_source=by_source)[0] == ("other_language", "en")
    assert judge(GERMAN, source="any", by_source=by_source)[0] is None
    assert judge(GERMAN, source="another", by_source=by_source)[0] == ("other_language", "de")


def test_a_language_may_have_its_own_least_confidence():
    assert judge(GERMAN, ("de",), min_score=0.999, min_scores={"de": 0.5})[0] is None
    assert judge(GERMAN, ("de",), min_score=0.5, min_scores={"de": 1.0})[0] == ("unsure_language", "de")


def test_the_bound_of_the_score_is_the_least_confidence():
    assert dict(LanguageFilter(LanguageConfig(min_score=0.4), ("en",), {}).bounds) == {"score": (0.4, None)}


def test_code_spans_placeholders_and_addresses_do_not_count_as_english():
    code = "`git commit --message {{the message of this commit, which tells why it was made and by whom}} --all`"
    address = "<https://example.org/how-to-write-the-messages-of-commits>"
    text = f"- Mache die Änderungen dauerhaft:\n\n{code}\n\n{address}\n"
    assert whole_text(text)[0] == "en"
    assert identify(text)[0] == "de"


def test_text_of_nothing_but_code_spans_is_judged_as_it_stands():
    assert identify("`def f(x)`\n`return x`") == pytest.approx(whole_text("`def f(x)`\n`return x`"))


def test_a_long_document_is_judged_by_all_of_it_not_by_its_start():
    notice = prose(1, 12)[:600]
    assert identify(notice + "\n" + (GERMAN + "\n") * 60)[0] == "de"


@pytest.mark.parametrize("shares", [(2, 8), (8, 2), (1, 9)])
def test_mixed_documents_get_the_language_that_the_whole_text_gets(shares):
    draw = random.Random(str(shares))
    lines = [GERMAN] * shares[0] * 4 + [prose(3)[: len(GERMAN)]] * shares[1] * 4
    draw.shuffle(lines)
    assert identify("\n".join(lines))[0] == whole_text("\n".join(lines))[0]


def test_a_50_mb_line_takes_no_longer_than_its_pieces():
    line = "x" * 50_000_000  # fastText takes minutes for a single such word
    assert len(spread(line, 200)) == 8 * 200 + 7
    assert identify(line)[1] < 0.75


@pytest.mark.parametrize("text", ["", " \n\t", "\0", "… — !", "\ud800 broken \udfff", "42"])
def test_text_without_words_is_no_error_and_never_sure(text):
    language, score = identify(text)
    assert isinstance(language, str)
    assert 0 <= score < 0.65


def test_pieces_hold_the_start_and_the_end_and_short_texts_are_whole():
    text = "".join(chr(0x4E00 + i) for i in range(5_000))
    pieces = spread(text, 100).split("\n")
    assert (pieces[0], pieces[-1], len(pieces)) == (text[:100], text[-100:], 8)
    assert all(piece in text for piece in pieces)
    assert spread(text[:800], 100) == text[:800]


def test_a_language_that_the_model_does_not_know_is_a_config_error():
    with pytest.raises(ConfigError, match=r"corpus.languages: got \['xx'\], .* expected codes among .* en "):
        LanguageFilter(LanguageConfig(), ("en", "xx"), {})
    with pytest.raises(ConfigError, match=r"source 'wiki': got \['english'\]"):
        LanguageFilter(LanguageConfig(), ("en",), {"wiki": ("english",)})
    with pytest.raises(ConfigError, match=r"min_scores: got \['zh_TW'\]"):
        LanguageFilter(LanguageConfig(min_scores={"zh_TW": 0.3}), (), {})


def test_a_missing_model_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus.language.model: got '.*none.bin', which does not exist"):
        LanguageFilter(LanguageConfig(model=str(tmp_path / "none.bin")), ("en",), {})


@pytest.mark.parametrize("num_bytes", [0, 3, 8, 40, 1_000, 50_000, 400_000, 937_000, 938_012])
def test_a_model_cut_off_anywhere_is_told_before_fasttext_crashes_on_it(tmp_path, num_bytes):
    path = tmp_path / "cut.ftz"
    path.write_bytes(bundled_model_path().read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=r"corpus.language.model: .*cut.ftz"):
        LanguageFilter(LanguageConfig(model=str(path)), ("en",), {})


def test_a_file_of_another_kind_or_with_more_behind_it_is_no_model(tmp_path):
    (tmp_path / "text.bin").write_text("These are not weights. " * 100)
    (tmp_path / "long.ftz").write_bytes(bundled_model_path().read_bytes() + b"\0")
    for name in ("text.bin", "long.ftz"):
        with pytest.raises(DataError, match=name):
            LanguageFilter(LanguageConfig(model=str(tmp_path / name)), ("en",), {})


def test_word_vectors_are_no_classifier(tmp_path):
    (tmp_path / "text").write_text(prose(1) * 9)
    vectors = train_unsupervised(
        str(tmp_path / "text"), dim=4, epoch=1, thread=11, verbose=0
    )  # fewer leave memory unset
    vectors.save_model(str(tmp_path / "v.bin"))
    with pytest.raises(DataError, match=r"v.bin has no labels __label__"):
        LanguageFilter(LanguageConfig(model=str(tmp_path / "v.bin")), ("en",), {})


def test_the_user_s_own_model_decides(tmp_path):
    path = tmp_path / "mine.ftz"
    shutil.copy(bundled_model_path(), path)
    assert judge(GERMAN, ("de",), model=str(path))[0] is None


def test_the_stated_size_of_a_model_is_its_size():
    assert stated_size(bundled_model_path()) == bundled_model_path().stat().st_size


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_shared_english_documents_get_fasttext_s_label_of_the_whole_text():
    with gzip.open(SHARED / "rust-rfcs.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:300]
    model = _FastText(str(bundled_model_path()))
    expected = [predict(model, text)[0] for text in texts]
    agreed = sum(identify(text)[0] == label for text, label in zip(texts, expected, strict=True))
    assert agreed >= 0.995 * len(texts)
