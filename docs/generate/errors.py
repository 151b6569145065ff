"""The index of error messages: every message that the code can raise for a user to fix, from its syntax trees."""

from __future__ import annotations

import ast
import html
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lilpipe import errors

PLACEHOLDER = "…"


def pages(root: Path) -> dict[str, str]:
    """Path to Markdown."""
    by_class: dict[str, set[str]] = defaultdict(set)
    for path in sorted(root.glob("lilpipe/**/*.py")):
        for kind, message in messages(path, is_config="config" in path.relative_to(root).parts):
            by_class[kind].add(message)
    lines = [
        "# Error messages",
        "",
        f"Every message that names something for you to fix, generated from the code; `{PLACEHOLDER}` stands for a "
        "value. Search the page for a few words of yours. [Troubleshooting](../troubleshooting.md) explains the common "
        "ones.",
        "",
        "None of these errors is retried: running the same thing again cannot help.",
        "",
    ]
    for kind in sorted(by_class):
        lines += [f"## {kind}", "", (getattr(errors, kind).__doc__ or "").strip(), ""]
        lines += [f"- {html.escape(message, quote=False)}" for message in sorted(by_class[kind], key=str.casefold)] + [
            ""
        ]
    return {"reference/errors.md": "\n".join(lines)}


def messages(path: Path, *, is_config: bool) -> Iterator[tuple[str, str]]:
    """Class and message of each `raise` of a class of `lilpipe.errors`.

    A ``ValueError`` of a configuration model reaches the user as a ``ConfigError``.
    """
    known = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LilpipeError)
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        kind = ast.unparse(node.exc.func)
        if is_config and kind == "ValueError":
            kind = "ConfigError"
        text = _text(node.exc.args[0])
        if kind in known and text and text.strip(PLACEHOLDER + ":; "):
            yield kind, text


def _text(node: ast.expr) -> str | None:
    """A message with its values left out; None where it is not written in the statement itself."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or PLACEHOLDER for value in values)
    return None
