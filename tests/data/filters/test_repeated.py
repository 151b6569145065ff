import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.repeated import LineFilter, ParagraphFilter, document_line_keys
from lilpipe.data.survey import KeyCounter, MergeCounts, merged_files, plan_merge, shard_buckets
from tests.data.prose import prose

NOTICE = "We use cookies to improve your experience."
MENU = "Home | News | Contact us | Imprint"


def document(text, number=0):
    return Document(id=f"d{number}", text=text, source="s", key=number)


def survey(folder, texts, *, most=6, shards=3):
    """The results of the survey of the texts' lines."""
    for rank in range(shards):
        counter = KeyCounter(folder, rank, document_line_keys)
        for number in range(rank, len(texts), shards):
            counter.add(document(texts[number], number))
        counter.close()
    tasks = plan_merge(folder, shard_buckets(folder, shards, bucket_documents=10**9))
    for rank in range(len(tasks)):
        MergeCounts(tasks, most).run(rank=rank)
    return merged_files(tasks, 0)


def pages(count, *shared):
    return ["\n".join([*shared, "", *(prose(100 * page + line, 2) for line in range(4))]) for page in range(count)]


def test_a_line_that_more_documents_share_than_allowed_is_cut_out_of_all_of_them(tmp_path):
    texts = pages(7, NOTICE) + [f"{MENU}\n{text}" for text in pages(6, NOTICE.upper().replace(" ", "  "))]
    line_filter = LineFilter(survey(tmp_path, texts))
    for number, text in enumerate(texts):
        each = document(text, number)
        assert line_filter(each) is None
        assert NOTICE.casefold() not in " ".join(each.text.casefold().split())
        assert (MENU in each.text) == (MENU in text), "six documents share it, and six may"
        assert each.scores["line_dedup.removed_lines"] == 1
        assert each.scores["line_dedup.removed_chars"] == pytest.approx(1 - len(each.text) / len(text))


def test_the_lines_that_are_cut_are_those_that_a_plain_count_finds(tmp_path):
    draw = random.Random(0)
    lines = [prose(number, 1) for number in range(60)]
    texts = ["\n".join(draw.choices(lines, k=draw.randint(1, 12))) for _ in range(40)]
    counts = Counter(line for text in texts for line in set(text.split("\n")))
    line_filter = LineFilter(survey(tmp_path, texts))
    assert {count > 6 for count in counts.values()} == {True, False}
    for text in texts:
        each = document(text)
        rejection = line_filter(each)
        assert each.text.split("\n") == ([line for line in text.split("\n") if counts[line] <= 6] or [""])
        assert (rejection is None) == bool(each.text)


def test_a_document_of_nothing_but_shared_lines_and_structure_goes(tmp_path):
    texts = [*pages(6, NOTICE), f"{NOTICE}\n\n---\n{NOTICE}\n"]
    rejection = LineFilter(survey(tmp_path, texts))(document(texts[-1]))
    assert rejection is not None
    assert rejection.reason == "only_repeated_lines"


def test_a_line_that_one_document_repeats_is_not_cut(tmp_path):
    texts = ["\n".join([NOTICE] * 20), *pages(5)]
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert each.text == texts[0]


def test_lines_of_exact_duplicates_count_once(tmp_path):
    text = pages(1)[0]
    counter = KeyCounter(tmp_path, 0, document_line_keys)
    for _ in range(10):
        counter.add(document(text, 5))
    counter.close()
    tasks = plan_merge(tmp_path, [range(1)])
    MergeCounts(tasks, 1).run(rank=0)
    each = document(text)
    assert LineFilter(merged_files(tasks, 0))(each) is None
    assert each.text == text


STRUCTURE = [
    "}",
    "```",
    "| --- | --- | --- | --- |",
    "+----------+----------+",
    "## What this is all about",
    "Specification",
    "standard library.",
    "    return the_value_of(this, and_that)",
    "\tif the_value_of(this) is None:",
]


@pytest.mark.parametrize("line", STRUCTURE)
def test_structure_that_all_documents_share_stays(tmp_path, line):
    texts = pages(9, line)
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert each.text == texts[0]


def test_fenced_code_that_all_documents_share_stays_and_what_follows_it_goes(tmp_path):
    code = "```python\nfrom the_library import everything_there_is as it\n```"
    texts = pages(9, code, NOTICE)
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert code in each.text
    assert NOTICE not in each.text


def test_code_that_a_line_opens_and_closes_is_no_fence(tmp_path):
    texts = pages(9, "```return it``` ends it", NOTICE)
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert NOTICE not in each.text


def test_lines_of_scripts_without_spaces_are_cut(tmp_path):
    notice = "本网站使用饼干以改善您的使用体验。"
    texts = pages(9, notice)
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert notice not in each.text


def test_cutting_leaves_one_blank_line_where_there_were_two(tmp_path):
    texts = [f"First {i} of all.\n\n{NOTICE}\n\nLast {i} of all.\n\n\nEnd {i}." for i in range(9)]
    each = document(texts[0])
    LineFilter(survey(tmp_path, texts))(each)
    assert each.text == "First 0 of all.\n\nLast 0 of all.\n\n\nEnd 0."


# --- paragraphs ---------------------------------------------------------------------------------------------------

FIRST, SECOND = prose(1, 2), prose(2, 2)


def test_of_equal_paragraphs_the_first_stays():
    each = document(f"{FIRST}\n\n{SECOND}\n\n{FIRST.replace(' ', chr(10), 5).upper()}\n\n{SECOND}.\n\n{FIRST}")
    before = len(each.text)
    assert ParagraphFilter()(each) is None
    assert each.text == f"{FIRST}\n\n{SECOND}\n\n{SECOND}.\n"
    assert each.scores["paragraph_dedup.removed_paragraphs"] == 2
    assert each.scores["paragraph_dedup.removed_chars"] == pytest.approx(1 - len(each.text) / before)


@pytest.mark.parametrize("paragraph", ["For example:", "### Examples", f"    {FIRST}", f"```\n{FIRST}\n\n{FIRST}\n```"])
def test_short_paragraphs_and_code_may_recur(paragraph):
    text = f"{paragraph}\n\n{SECOND}\n\n{paragraph}\n"
    each = document(text)
    ParagraphFilter()(each)
    assert each.text == text


@given(st.lists(st.sampled_from([FIRST, SECOND, "short", "", "```", "    code"]), max_size=12))
def test_cutting_paragraphs_twice_is_cutting_them_once_and_loses_no_text(parts):
    each = document("\n\n".join(parts))
    before = set(each.text.split("\n"))
    ParagraphFilter()(each)
    assert {line for line in each.text.split("\n") if line} == before - {""}
    once = each.text
    ParagraphFilter()(each)
    assert each.text == once
    assert np.isclose(each.scores["paragraph_dedup.removed_chars"], 0)
