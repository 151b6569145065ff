"""Text of unknown origin in a terminal: control characters are shown, not obeyed.

A document, a model or a file name may contain escape sequences that move the cursor, set the clipboard or reverse the
order of a line (Boucher and Anderson 2021, "Trojan Source").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and newline, C1, separators of lines, bidirectional controls, and surrogates, which have no UTF-8."""


def visible(text: str) -> str:
    r"""Return the text with control characters as escapes, such as ``\x1b`` or ``\u202e``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _Visible:
    """A renderable whose text is shown with ``visible``; rich's own control codes stay."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else visible(text), style, control)


class _VisibleHook(RenderHook):
    def process_renderables(self, renderables: Sequence[ConsoleRenderable]) -> list[ConsoleRenderable]:  # type: ignore[override]
        return [_Visible(each) for each in renderables]


def make_console(**options: Any) -> Console:
    """Return a console for text of unknown origin; ``options`` are those of ``rich.console.Console``."""
    console = Console(**options)
    console.push_render_hook(_VisibleHook())
    return console
