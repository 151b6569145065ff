"""MathML to TeX: the TeX annotation of the page if there is one, else a simple conversion of the presentation markup.

Packages for this were not suitable: mathml-to-latex 1.0.0 writes matrices without an environment and fails on missing
children; mml2tex 0.1.0 takes over a second per formula and needs a 100 MB library.
"""

from __future__ import annotations

from collections.abc import Callable

from lxml.html import HtmlElement

TEX_ENCODINGS = ("application/x-tex", "application/x-latex", "latex", "tex")
STYLED = "{\\displaystyle "


def to_tex(formula: HtmlElement) -> str:
    """Return a ``<math>`` element as TeX, from its annotation, its alternative text or its elements."""
    for annotation in formula.iter("annotation"):
        if annotation.get("encoding", "").lower() in TEX_ENCODINGS:
            return unwrapped(annotation.text_content())
    return unwrapped(formula.get("alttext") or _tex(formula))


def unwrapped(tex: str) -> str:
    """Return TeX without the style that Wikipedia adds, and without repeated white space."""
    tex = " ".join(tex.split())
    return tex[len(STYLED) : -1].strip() if tex.startswith(STYLED) and tex.endswith("}") else tex


def _tex(element: HtmlElement) -> str:
    children = [child for child in element if isinstance(child.tag, str) and not child.tag.startswith("annotation")]
    name = element.tag.rsplit(":", 1)[-1]
    arity, form = _FORMS.get(name, (None, None))
    if form is not None and arity == len(children):
        return form(*map(_tex, children))
    if name == "msqrt":
        return f"\\sqrt{{{_row(children)}}}"
    if name == "mtr":
        return " & ".join(map(_tex, children))
    if name == "mtable":
        rows = " \\\\ ".join(map(_tex, children))
        return f"\\begin{{matrix}} {rows} \\end{{matrix}}"
    if name == "mtext":
        return f"\\text{{{element.text_content().strip()}}}"
    if children:
        return _row(children)
    text = element.text_content().strip()
    return _OPERATORS.get(text) or text


def _row(children: list[HtmlElement]) -> str:
    return " ".join(part for part in map(_tex, children) if part)


_FORMS: dict[str, tuple[int, Callable[..., str]]] = {
    "mfrac": (2, lambda above, below: f"\\frac{{{above}}}{{{below}}}"),
    "mroot": (2, lambda base, index: f"\\sqrt[{index}]{{{base}}}"),
    "msup": (2, lambda base, above: f"{base}^{{{above}}}"),
    "msub": (2, lambda base, below: f"{base}_{{{below}}}"),
    "msubsup": (3, lambda base, below, above: f"{base}_{{{below}}}^{{{above}}}"),
    "mover": (2, lambda base, above: f"{base}^{{{above}}}"),
    "munder": (2, lambda base, below: f"{base}_{{{below}}}"),
    "munderover": (3, lambda base, below, above: f"{base}_{{{below}}}^{{{above}}}"),
}

_OPERATORS = {"∑": "\\sum", "∏": "\\prod", "∫": "\\int", "∞": "\\infty", "≤": "\\le", "≥": "\\ge", "≠": "\\ne"}
_OPERATORS |= {"×": "\\times", "·": "\\cdot", "±": "\\pm", "→": "\\to", "∈": "\\in"}
