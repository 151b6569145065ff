"""A page for each package of the library, filled by mkdocstrings from the docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = "reference/api"


def pages(library: Path) -> dict[str, str]:
    """Path to Markdown: an index, a page for the modules at the top, and one for each package."""
    packages = sorted(path.parent for path in library.rglob("__init__.py"))
    found = {}
    rows = []
    for package in packages:
        name = ".".join(package.relative_to(library.parent).parts)
        modules = sorted(path for path in package.glob("*.py") if not path.name.startswith("_"))
        if not modules:
            continue
        rows.append(f"| [`{name}`]({name}.md) | {summary(package / '__init__.py')} |")
        found[f"{FOLDER}/{name}.md"] = _page(name, modules)
    index = ["# Python API", "", "Generated from the docstrings.", "", "| Package | Contents |", "| --- | --- |", *rows]
    return {f"{FOLDER}/index.md": "\n".join(index) + "\n", **found}


def summary(module: Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _page(package: str, modules: list[Path]) -> str:
    lines = [f"# {package}", ""]
    for module in modules:
        lines += [f"## {module.stem} {{#{package}.{module.stem}-module}}", "", f"::: {package}.{module.stem}"]
        lines += ["    options:", "      show_root_heading: false", "      show_root_toc_entry: false", ""]
    return "\n".join(lines)
