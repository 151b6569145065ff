"""The Python reference: the order of the packages, and a page for each package, filled by mkdocstrings."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

FOLDER = "reference/api"


def pages(library: Path) -> dict[str, str]:
    """Path to Markdown: an index in the order of imports, and a page for each package."""
    found = {}
    for package in sorted(path.parent for path in library.rglob("__init__.py")):
        name = ".".join(package.relative_to(library.parent).parts)
        if modules := sorted(path for path in package.glob("*.py") if not path.name.startswith("_")):
            found[f"{FOLDER}/{name}.md"] = _page(name, modules)
    return {f"{FOLDER}/index.md": _index(library, set(found)), **found}


def layers(pyproject: Path, container: str) -> list[list[str]]:
    """The packages of each layer, from the top down, as the import contract has them."""
    settings = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if container in contract.get("containers", ()):
            return [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]
    raise LookupError(container)


def summary(module: Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _index(library: Path, found: set[str]) -> str:
    lines = [
        "# Python API",
        "",
        "Generated from the docstrings. Packages and modules from the top layer down: each imports only from layers "
        "below it. Import contracts in `pyproject.toml` hold this order as part of `make lint`.",
        "",
        "| Layer | Package or module | Contents |",
        "| --- | --- | --- |",
    ]
    order = layers(library.parent / "pyproject.toml", library.name)
    for height, names in zip(range(len(order), 0, -1), order, strict=True):
        for number, name in enumerate(names):
            module, target = library / f"{name}.py", f"{library.name}.md#{library.name}.{name}-module"
            if not module.is_file():
                module, target = library / name / "__init__.py", f"{library.name}.{name}.md"
            has_page = f"{FOLDER}/{target.partition('#')[0]}" in found
            link = f"[`{name}`]({target})" if has_page else f"`{name}`"  # else its modules are in inner packages
            lines.append(f"| {'' if number else height} | {link} | {summary(module)} |")
    return "\n".join(lines) + "\n"


def _page(package: str, modules: list[Path]) -> str:
    lines = [f"# {package}", ""]
    for module in modules:
        lines += [f"## {module.stem} {{#{package}.{module.stem}-module}}", "", f"::: {package}.{module.stem}"]
        lines += ["    options:", "      show_root_heading: false", "      show_root_toc_entry: false", ""]
    return "\n".join(lines)
