import pytest

from lilpipe.data.sources.extraction import Refused, extract
from lilpipe.data.sources.extraction_process import ExtractionFailed, ExtractionProcess
from tests.data.prose import prose

CODE = """def merge(a, b):
    out = []

    while a and b:
        out.append(a.pop(0) if a[0] < b[0] else b.pop(0))
    return out + a + b"""
ESCAPED = CODE.replace("<", "&lt;")


def page(*parts):
    """A page with enough prose around the parts to be taken for an article."""
    inner = "".join(f"<p>{prose(seed)}</p>{part}" for seed, part in enumerate(parts))
    return (
        "<html><head><title>t</title></head><body><nav><a href='/'>Home</a></nav>"
        f"<article><h1>On sorting</h1>{inner}<p>{prose(99)}</p></article><footer>Copyright</footer></body></html>"
    )


def test_the_main_text_comes_without_what_is_around_it():
    text = extract(page(""))
    assert text.startswith("On sorting\n")
    assert prose(0) in text
    assert "Home" not in text
    assert "Copyright" not in text


@pytest.mark.parametrize(
    "html",
    [
        f'<pre><code class="language-python">{ESCAPED}\n</code></pre>',
        f'<div class="highlight-python"><pre>{ESCAPED.replace("def", "<span class=k>def</span>")}</pre></div>',
        f'<pre class="brush: python">{ESCAPED.replace(chr(10), "<br>")}</pre>',
        '<table class="highlighttable highlight-python"><tr><td class="linenos"><pre>1\n2\n3</pre></td>'
        f'<td class="code"><div class="highlight-python"><pre>{ESCAPED}</pre></div></td></tr></table>',
    ],
    ids=["code", "highlighted by spans", "broken by tags", "beside its line numbers"],
)
def test_a_block_of_code_keeps_every_character(html):
    assert f"\n```python\n{CODE}\n```\n" in extract(page(html))


def test_preformatted_prose_is_not_fenced_and_keeps_its_lines():
    assert "\n  one\n    two\n" in extract(page("<pre>one</pre><pre>x\n  one\n    two\n</pre>"))
    assert "```" not in extract(page("<pre>one</pre>"))


def test_code_within_a_sentence_stays_within_it():
    assert "Call `f(x, y)` twice." in extract(page("<p>Call <code>f(x,\n y)</code> twice.</p>"))


KATEX = (
    '<span class="katex"><span class="katex-mathml"><math><semantics><mrow><mi>n</mi></mrow>'
    '<annotation encoding="application/x-tex">n \\log n</annotation></semantics></math></span>'
    '<span class="katex-html" aria-hidden="true">nlogn</span></span>'
)
WIKIPEDIA = (
    '<span class="mwe-math-element"><span class="mwe-math-mathml-inline" style="display: none;">'
    '<math alttext="{\\displaystyle n\\log n}"><mi>n</mi></math></span>'
    '<img src="x.svg" class="mwe-math-fallback-image-inline" alt="{\\displaystyle n\\log n}"></span>'
)


@pytest.mark.parametrize(
    ("html", "tex"),
    [
        (KATEX, "$n \\log n$"),
        (f'<span class="katex-display">{KATEX}</span>', "$$n \\log n$$"),
        (WIKIPEDIA, "$n\\log n$"),
        ('<math alttext="\\frac{a}{b}"><mi>a</mi></math>', "$\\frac{a}{b}$"),
        (
            '<span class="MathJax_Preview">old</span><span class="MathJax"><math><mi>x</mi></math></span>'
            '<script type="math/tex">x &lt 5</script>',
            "$x &lt 5$",  # a script holds characters, no entities
        ),
        ('<script type="math/tex; mode=display">a < b</script>', "$$a < b$$"),
        ('<img class="latex" src="x.png" alt="a_1">', "$a_1$"),
        ("\\(a^2\\) and $b^2$", "\\(a^2\\) and $b^2$"),
        (
            "<math><msup><mi>x</mi><mn>2</mn></msup><mo>≤</mo><mfrac><mn>1</mn><msqrt><mi>y</mi></msqrt></mfrac></math>",
            "$x^{2} \\le \\frac{1}{\\sqrt{y}}$",
        ),
    ],
    ids=["KaTeX", "KaTeX display", "Wikipedia", "alttext", "MathJax 2", "display", "picture", "raw", "MathML"],
)
def test_a_formula_is_kept_as_tex_once_in_its_sentence(html, tex):
    assert f"The cost is {tex} in all." in extract(page(f"<p>The cost is {html} in all.</p>"))


def test_a_table_of_data_keeps_its_cells_the_empty_ones_too():
    head = "<tr><th>Name</th><th>Worst <b>case</b></th><th>Memory</th></tr>"
    rows = f"<tr><td>Merge</td><td>{KATEX}</td><td></td></tr><tr><td>a|b</td><td><code>x</code></td></tr>"
    text = extract(page(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"))
    expected = [
        "| Name | Worst case | Memory |",
        "| --- | --- | --- |",
        "| Merge | $n \\log n$ |  |",
        "| a\\|b | `x` |  |",
    ]
    assert "\n".join(expected) in text


def test_a_table_that_is_a_layout_is_no_table():
    text = extract(
        page(f"<table><tr><td><h2>Left</h2><p>{prose(7)}</p></td><td><ul><li>{prose(8)}</li></ul></td></tr></table>")
    )
    assert prose(7) in text
    assert "| ---" not in text


def test_a_page_without_text_gives_none():
    for html in ("", " ", "<html></html>", "<html><body><img src=x></body></html>"):
        assert extract(html) == ""


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<p>a</p>" * 100_000, "has 200,002 tags, expected at most 100,000"),
        ("<div>" * 5_000 + "text", "2048 nested elements"),
    ],
)
def test_a_page_of_too_many_or_too_deep_tags_is_refused(html, reason):
    with pytest.raises(Refused, match=reason):
        extract(f"<html><body>{html}")


def test_entities_that_a_page_defines_are_not_expanded():
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 30))
    html = f'<!DOCTYPE html [<!ENTITY e0 "lol">{entities}]><html><body><p>&e29; {prose(0)}</p></body></html>'
    assert len(extract(html)) < 2 * len(prose(0))


@pytest.fixture(scope="module")
def extraction():
    with ExtractionProcess() as process:
        yield process


def test_the_process_gives_what_the_function_gives(extraction):
    html = page(f"<p>{KATEX} \N{SNOWMAN}</p>")
    assert extraction.extract(html) == extract(html) == extraction.extract(html)


def test_a_page_that_takes_too_long_is_given_up_and_the_next_one_is_read():
    slow = "<html><body>" + "<table><tr><td>" * 600 + "a word" + "</td></tr></table>" * 600  # minutes
    with ExtractionProcess(cpu_seconds=0.7) as process:
        with pytest.raises(ExtractionFailed, match=r"took more than 0.7 s"):
            process.extract(slow)
        assert prose(0) in process.extract(page(""))


def test_a_page_that_takes_too_much_memory_is_given_up_and_the_next_one_is_read():
    with ExtractionProcess(memory_bytes=320 * 2**20) as process:
        with pytest.raises(ExtractionFailed):
            process.extract(f"<html><body><p>{'word ' * 10_000_000}")
        assert prose(0) in process.extract(page(""))


def test_a_formula_nested_beyond_pythons_stack_is_an_error_and_no_crash(extraction):
    with pytest.raises(ExtractionFailed, match="RecursionError"):
        extraction.extract("<html><body><math>" + "<mrow>" * 1_900 + "x")
    assert prose(0) in extraction.extract(page(""))
