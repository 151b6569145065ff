"""HTML to text by trafilatura (Barbaresi 2021), with code, formulas and tables preserved.

trafilatura drops formulas, the indentation of code, and empty table cells. So these elements are first replaced by
placeholder words of the same length, which keeps the text lengths and densities that trafilatura's heuristics use. Then
the placeholders in the extracted text are replaced: code between fences, formulas as TeX between dollar signs, tables
as Markdown.
"""

from __future__ import annotations

import hashlib
import re

import trafilatura
from lxml.html import HtmlElement, HTMLParser, document_fromstring

from lilpipe.data.sources.mathml import to_tex, unwrapped

MAX_TAGS = 100_000
"""Pages with more ``<`` are rejected before parsing: tree operations can take quadratic time."""
TOO_DEEP = "Excessive depth"
"""Message of libxml2 when it stops at 2048 nested elements."""
MAX_WORD_CHARS = 2_000

FORMULA_CLASSES = ("mwe-math-element", "katex-display", "katex")
"""Classes of elements that contain a formula and its rendered form (Wikipedia, KaTeX)."""
RENDERED_CLASSES = ("MathJax_Preview", "MathJax_Display", "MathJax", "MathJax_SVG", "MathJax_CHTML")
"""Classes of rendered formulas that MathJax 2 adds next to the script with the formula."""
LINE_NUMBER_CLASSES = ("linenos", "lineno", "linenodiv", "line-numbers-rows", "gutter", "blob-num")
CODE_CLASS = re.compile(r"(?:^|\s)(?:lang|language|brush|highlight-source|highlight|sourceCode)[-:\s]\s*([\w+#]+)")
BLOCKS = ("table", "pre", "ul", "ol", "dl", "blockquote", "form", *(f"h{level}" for level in range(1, 7)))
"""A table with one of these elements is a layout table."""
MAX_MEAN_CELL_CHARS = 200
"""Tables with a larger mean cell length are layout tables."""

TWICE_CHARS = 600
"""If trafilatura finds fewer than 250 characters, it adds all paragraphs again, so shorter texts are deduplicated."""


class Refused(ValueError):
    """Raised for pages that are not worth extracting."""


def extract(html: str) -> str:
    """Return the main text of a page, empty if there is none. Raises ``Refused`` for too many or too deeply nested
    tags.
    """
    tree = _parse(html)
    if tree is None:
        return ""
    kept = _Kept(html)
    _keep_formulas(tree, kept)
    _keep_code(tree, kept)
    _keep_tables(tree, kept)
    text = trafilatura.extract(tree, include_comments=False) or ""
    if len(text) < TWICE_CHARS:
        text = "\n".join(dict.fromkeys(text.splitlines()))
    return kept.put_back(text).strip()


def _parse(html: str) -> HtmlElement | None:
    num_tags = html.count("<")
    if num_tags > MAX_TAGS:
        raise Refused(f"has {num_tags:,} tags, expected at most {MAX_TAGS:,}")
    if not num_tags or not html.strip():
        return None
    parser = HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False, huge_tree=True)
    try:
        tree = document_fromstring(html.encode(errors="replace"), parser=parser)
    except ValueError:  # lxml's ParserError: empty document
        return None
    if any(TOO_DEEP in entry.message for entry in parser.error_log):
        raise Refused("has more than 2048 nested elements")
    return tree


class _Kept:
    """Elements taken from a page, by placeholder word."""

    def __init__(self, html: str) -> None:
        self._sign = "kept" + hashlib.blake2b(html.encode(errors="replace"), digest_size=6).hexdigest()
        self._texts: list[str] = []

    def take(self, element: HtmlElement, text: str, *, block: bool) -> None:
        """Replace an element by a placeholder, as a paragraph (``block``) or inline."""
        word = f"{self._sign}{len(self._texts):06d}"
        word += "x" * min(len(text) - len(word), MAX_WORD_CHARS)
        self._texts.append(f"\n{text}\n" if block else text)
        for child in list(element):
            element.remove(child)
        element.attrib.clear()
        element.text, element.tag = word, "p" if block else "span"

    def put_back(self, text: str) -> str:
        """Return the text with all placeholders replaced, also nested ones."""
        word = re.compile(rf"{self._sign}(\d{{6}})x*")
        return word.sub(lambda match: self.put_back(self._texts[int(match[1])]), text)


def _with_class(tree: HtmlElement, names: tuple[str, ...], tag: str = "*") -> list[HtmlElement]:
    conditions = (f"contains(concat(' ', normalize-space(@class), ' '), ' {name} ')" for name in names)
    return tree.xpath(f"//{tag}[{' or '.join(conditions)}]")


# --- formulas -----------------------------------------------------------------------------------------------------


def _keep_formulas(tree: HtmlElement, kept: _Kept) -> None:
    scripts = tree.xpath("//script[starts-with(@type, 'math/tex')]")
    if scripts:
        for rendered in _with_class(tree, RENDERED_CLASSES):
            _drop(rendered)
    for script in scripts:
        kept.take(script, _dollars(script.text or "", "display" in script.get("type", "")), block=False)
    for box in _with_class(tree, FORMULA_CLASSES):
        formula = box.find(".//math")
        if formula is not None:
            display = "display" in box.get("class", "") or formula.get("display") == "block"
            kept.take(box, _dollars(to_tex(formula), display), block=False)
    for formula in tree.xpath("//math"):
        kept.take(formula, _dollars(to_tex(formula), formula.get("display") == "block"), block=False)
    for image in _with_class(tree, ("latex", "tex", "math", "mwe-math-fallback-image-inline"), "img[@alt]"):
        kept.take(image, _dollars(image.get("alt"), False), block=False)


def _dollars(tex: str, display: bool) -> str:
    return f"$${unwrapped(tex)}$$" if display else f"${unwrapped(tex)}$"


def _drop(element: HtmlElement) -> None:
    if element.getparent() is not None:
        element.drop_tree()


# --- code ---------------------------------------------------------------------------------------------------------


def _keep_code(tree: HtmlElement, kept: _Kept) -> None:
    for numbers in _with_class(tree, LINE_NUMBER_CLASSES):
        _drop(numbers)
    for block in tree.xpath("//pre"):
        for cell in block.iterancestors("td", "tr", "tbody", "table"):  # a table of line numbers and code
            cell.tag = "div"
        text = _verbatim(block)
        if text.strip():
            kept.take(block, _fenced(block, text), block=True)
    for code in tree.xpath("//code"):
        text = " ".join(code.text_content().split())
        if text:
            kept.take(code, f"`{text}`", block=False)


def _verbatim(block: HtmlElement) -> str:
    for line_break in block.iter("br"):
        line_break.text = "\n"
    return block.text_content().strip("\n").rstrip()


def _fenced(block: HtmlElement, text: str) -> str:
    """Return code between fences, with the language if a class names it; preformatted prose is returned unchanged."""
    code = block.find(".//code")
    classes = [each.get("class", "") for each in (code, block, block.getparent()) if each is not None]
    language = next((match[1] for match in map(CODE_CLASS.search, classes) if match), "")
    is_code = code is not None or bool(language) or block.find(".//span") is not None
    return f"```{language}\n{text}\n```" if is_code else text


# --- tables -------------------------------------------------------------------------------------------------------


def _keep_tables(tree: HtmlElement, kept: _Kept) -> None:
    """Replace data tables by placeholders; layout tables are unchanged."""
    for table in tree.xpath(f"//table[not({' or '.join(f'.//{name}' for name in BLOCKS)})]"):
        rows = [[" ".join(cell.text_content().split()) for cell in row.xpath("./td|./th")] for row in table.iter("tr")]
        rows = [row for row in rows if any(row)]
        cells = [cell for row in rows for cell in row]
        links = sum(len(link.text_content()) for link in table.iter("a"))
        num_chars = sum(map(len, cells))
        if len(rows) < 2 or max(map(len, rows)) < 2 or 2 * links > num_chars:
            continue
        if num_chars <= MAX_MEAN_CELL_CHARS * len(cells):
            kept.take(table, _markdown(rows), block=True)


def _markdown(rows: list[list[str]]) -> str:
    width = max(map(len, rows))
    padded = [[cell.replace("|", "\\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + " --- |" * width, *lines[1:]])
