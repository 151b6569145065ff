"""The report of a corpus made by hand, read as a browser would read it."""

import html
import re
from html.parser import HTMLParser

import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.sources import Source
from lilpipe.data.corpus_report import MAX_FUNNEL_SOURCES, build_report
from lilpipe.data.counts import count_documents

from .corpora import THRESHOLDS, document, write_corpus

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)> & <b>bold</b>'
URL = "https://evil.example.net/page"
VOID = {"meta", "br", "img", "link", "col", "input"}


class Page(HTMLParser):
    """Tags, attributes and the text of a page; raises if a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.tables, self.open = [], [], [], []
        self.sections: dict[str, str] = {}
        self.details = []
        self.heading = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((self.heading, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        elif tag == "h2":
            self.heading = ""
        elif tag == "details":
            self.details.append([self.heading, "", ""])

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.heading += data
        elif {"td", "th"} & set(self.open):
            self.tables[-1][1][-1][-1] += data
        elif "details" in self.open:
            self.details[-1][2 if "pre" in self.open else 1] += data
        if self.open and self.open[-1] not in ("style", "script"):
            self.sections[self.heading] = self.sections.get(self.heading, "") + data + "\n"

    def table(self, section, number=0):
        """Rows of a table in a section, as dictionaries."""
        head, *rows = [rows for heading, rows in self.tables if heading == section][number]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def samples(self, section):
        """Title and text of the samples of a section."""
        return [(title, text) for heading, title, text in self.details if heading == section]


def report(folder, kept, rejected, unreadable=(), findings=None, sources=("books", "songs")):
    corpus = write_corpus(folder, kept, rejected, rows_per_file=50)
    counts = count_documents(list(sources), corpus, list(unreadable), THRESHOLDS)
    config = CorpusConfig(sources=tuple(Source(kind="text", name=name, path="x") for name in sources))
    text = build_report(config, counts, corpus, unreadable, thresholds=THRESHOLDS, findings=findings or {})
    return text, Page(text), counts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    kept = [document(f"kept/{n}", f"Kept text {n}.", num_bytes=100_000, licence="CC0", label="tale") for n in range(30)]
    kept[0].text, kept[0].id, kept[0].licence = f"{EVIL} {URL} " + "x" * 2_000, f"<i>{URL}", "<u>MIT</u>"
    kept[0].scores = {"pii.emails": 3, "length.chars": 300}
    kept += [document("song", "La la.", source="songs", num_bytes=700_000, language="fr", scores={"length.chars": 900})]
    no_language = {"language": None, "language_score": None}
    rejected = [
        (document(f"short/{n}", f"Short {n}.", num_bytes=10_000, **no_language), "length", "too_few_chars", "")
        for n in range(25)
    ]
    rejected += [(document("blank", "...", num_bytes=50_000, **no_language), "length", "no_words", "")]
    near = document("near", EVIL, source="songs", num_bytes=40_000)
    rejected += [(near, "near_dedup", "near_duplicate", "<i>kept")]
    unreadable = [
        {"source": "songs", "file": f"{n}.jsonl", "row": n, "error": f"is <b>{n}", "excerpt": ""} for n in range(20)
    ]
    findings = {"Evaluation sets": ["<p>found nothing</p>"]}
    return report(tmp_path_factory.mktemp("report"), kept, rejected, unreadable, findings)


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(made):
    text, page, _ = made
    assert text.startswith("<!doctype html>")
    assert {"script", "link", "iframe", "object", "embed", "base", "form"}.isdisjoint(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (tag, name, value)  # glyphs inside a picture
        assert "://" not in value or name.startswith("xmlns"), (tag, name, value)
    styles = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    assert "@import" not in styles
    assert not re.search(r"url\((?!#)", text)
    assert "<svg" in text


def test_documents_ids_and_licences_are_shown_as_they_are_and_do_nothing(made):
    text, page, _ = made
    for foreign in ("<script>", "onerror=alert(2)>", "<b>bold", "<i>", "<u>MIT", "is <b>3"):
        assert foreign not in text
    title, shown = page.samples("Samples of kept documents")[0]
    assert title.startswith(f"<i>{URL}")
    assert shown.startswith(f"{EVIL} {URL} xxx")
    assert "<u>MIT</u>" in page.sections["Licences"]
    assert ("near", EVIL) in [(title[:4], text) for title, text in page.samples("Samples of rejected documents")]


def test_the_funnel_has_what_is_left_after_each_stage_as_the_counts_say(made):
    _, page, counts = made
    total = counts.total()
    rows = page.table("From read to kept")
    names = [
        *("Read", "Blocked addresses", "Length", "Exact duplicates", "Language", "Repeated lines", "C4"),
        *("Personal data", "Evaluation sets", "Near-duplicates"),
    ]
    assert [row["after"] for row in rows] == names
    assert [row["documents"] for row in rows] == ["58", "58", *["32"] * 7, "31"]
    assert [row["rejected"] for row in rows] == ["", "0", "26", *["0"] * 6, "1"]
    assert [row["MB"] for row in rows] == ["4.04", "4.04", *["3.74"] * 7, "3.7"]
    assert [row["MB rejected"] for row in rows] == ["", "0", "0.3", *["0"] * 6, "0.04"]
    assert (total.read.documents, total.kept.documents) == (58, 31)
    assert (total.read.bytes, total.kept.bytes) == (4_040_000, 3_700_000)


def test_key_figures_and_sources_add_up_to_the_counts(made):
    _, page, _ = made
    figures = page.sections[""]
    for each in ("58\ndocuments read", "31\ndocuments kept", "53.4%\n", "3.7 MB of 4.0 MB\n", "20\nrows quarantined"):
        assert each in figures
    books, songs = page.table("By source")
    assert books == {
        "source": "books", "read": "56", "MB read": "3.3", "kept": "30", "MB kept": "3",
        "kept share": "53.6%", "quarantined": "0",
    }  # fmt: skip
    assert (songs["read"], songs["kept"], songs["quarantined"]) == ("2", "1", "20")
    by_stage = page.table("By source", 1)
    assert by_stage == [
        {"source": "books", "Length": "26", "Near-duplicates": "0"},
        {"source": "songs", "Length": "0", "Near-duplicates": "1"},
    ]
    assert [row["Length"] for row in page.table("By source", 2)] == ["0.3", "0"]


def test_reasons_have_their_number_and_their_share_of_all_that_was_read(made):
    _, page, _ = made
    rows = [rows for heading, rows in page.tables if heading == "Why documents were rejected"]
    assert [[row[:3] for row in each] for each in rows] == [
        [["too_few_chars", "25", "43.1%"], ["no_words", "1", "1.7%"]],
        [["near_duplicate", "1", "1.7%"]],
    ]


def test_what_was_changed_languages_licences_and_labels_are_told_of_what_was_kept(made):
    _, page, _ = made
    assert page.table("What was changed in the documents kept") == [
        {"filter": "Personal data", "what": "emails", "in all documents": "3"}
    ]
    assert page.table("Languages", 1) == [
        {"language": "en", "documents": "30", "MB": "3"},
        {"language": "fr", "documents": "1", "MB": "0.7"},
    ]
    assert [row["licence"] for row in page.table("Licences", 1)] == ["CC0", "none given", "<u>MIT</u>"]
    assert [row["label"] for row in page.table("Labels", 1)] == ["tale", "none given"]


def test_samples_are_at_most_ten_kept_ones_and_ten_for_each_reason_and_cut(made):
    _, page, _ = made
    assert len(page.samples("Samples of kept documents")) == 10
    rejected = page.samples("Samples of rejected documents")
    assert [text[:5] for _, text in rejected] == ["Short"] * 10 + [EVIL[:5], "..."]
    assert "<i>kept" in rejected[10][0]  # what it duplicated
    assert max(len(text) for _, text in page.samples("Samples of kept documents")) < 1_600


def test_of_many_unreadable_rows_the_first_are_shown_and_the_rest_counted(made):
    _, page, _ = made
    rows = page.table("Unreadable rows")
    assert [row["error"] for row in rows] == [f"is <b>{n}" for n in range(15)]
    assert "And 5 more, all in quarantine.jsonl" in page.sections["Unreadable rows"]


def test_findings_are_sections_of_their_own_and_the_settings_are_there(made):
    _, page, _ = made
    assert "found nothing" in page.sections["Evaluation sets"]
    (settings,) = [text for heading, _, text in page.details if heading == "Settings"]
    assert CorpusConfig.model_validate_json(settings).quality == CorpusConfig().quality  # whole, not cut


def test_a_corpus_of_one_plain_document_has_a_report_too(tmp_path):
    _, page, _ = report(tmp_path, [document("only")], [], sources=("books",))
    assert "None." in page.sections["Why documents were rejected"]
    assert "None." in page.sections["Samples of rejected documents"]
    assert "No filter computed a score." in page.sections["Scores and thresholds"]
    assert "Labels" not in page.sections


def test_more_sources_than_colours_are_drawn_together(tmp_path):
    names = [f"source {n}" for n in range(MAX_FUNNEL_SOURCES + 3)]
    kept = [document(name, source=name, num_bytes=1_000 * (50 - n)) for n, name in enumerate(names)]
    text, page, _ = report(tmp_path, kept, [], sources=names)
    assert len(page.table("By source")) == len(names)
    drawn = [html.unescape(each) for each in re.findall(r"<text[^>]*>(.*?)</text>", text)]
    assert [each for each in drawn if each.startswith("source ")] == names[: MAX_FUNNEL_SOURCES - 1]
    assert "4 others" in drawn


def test_the_same_corpus_gives_the_same_page(tmp_path):
    pages = {report(tmp_path / name, [document("a", scores={"length.chars": 9})], [])[0] for name in ("one", "two")}
    assert len(pages) == 1
