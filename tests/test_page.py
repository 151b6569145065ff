from lilpipe.page import Fragment, bar_table, folded, heading, highlighted, note, render, table, text_block

HOSTILE = "<script>alert('x')</script> & co"


def test_text_from_outside_is_shown_and_never_run():
    fragments = [
        table([{HOSTILE: HOSTILE}]),
        bar_table({HOSTILE: 1}),
        text_block(HOSTILE, title=HOSTILE, detail=HOSTILE),
        highlighted([(HOSTILE, True), (HOSTILE, False)]),
        folded(note(HOSTILE), title=HOSTILE),
        heading(HOSTILE),
        note(HOSTILE),
    ]
    shown = render(HOSTILE, {HOSTILE: fragments}, subtitle=HOSTILE, key_figures={HOSTILE: HOSTILE})
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 18


def test_numbers_are_rounded_and_aligned_and_a_column_with_a_word_is_not():
    shown = table(
        [{"n": 1234567, "x": 0.123456, "share": "5%", "word": "a"}, {"n": None, "x": 3.0, "share": "", "word": 2}]
    )
    for cell in ("1,234,567", "0.1235", "3", "5%"):
        assert f'<td class="number">{cell}</td>' in shown
    assert "<td>a</td>" in shown
    assert "<td>2</td>" in shown


def test_bars_show_shares_and_are_scaled_to_the_largest():
    shown = bar_table({"a": 30, "b": 15}, total=60)
    assert "50.0%" in shown
    assert "25.0%" in shown
    assert "width:50.00%" in shown
    assert "None." in bar_table({})


def test_a_long_text_is_cut_and_says_how_long_it_was():
    assert "(3,000 characters)" in text_block("x" * 3_000, max_chars=100)


def test_a_section_that_is_plain_text_is_escaped_and_a_fragment_is_not():
    shown = render("Title", {"text": [HOSTILE], "html": Fragment("<i>word</i>")})  # pyright: ignore[reportArgumentType]
    assert "<script" not in shown
    assert "<i>word</i>" in shown
