"""Documentation of the Python environment, read without importing a package.

Documents are docstrings of the standard library and of the installed distributions, parsed by ``ast`` (one document per
module, several for a large one); the help topics of ``pydoc``; and READMEs in the metadata of distributions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

from lilpipe.artifact import digest_json

SKIPPED_DISTRIBUTIONS = frozenset({"lilpipe"})
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "_vendor", "_vendored", "vendor", "vendored", "site-packages", "__pycache__"}
)
"""Tests have little documentation; vendored packages have another version and licence than their distribution."""

MAX_SOURCE_BYTES = 2_000_000
"""Maximum size of a module; larger ones are generated tables."""

TEXT_CHARS = 4_000
"""Approximate size of the texts that a module's docstrings are split into, about a web page as the filters expect."""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, or the standard library."""

    name: str
    version: str
    folder: Path
    """Root of its modules' relative paths."""
    info: Path | None = None
    """The `.dist-info` folder."""


@dataclass(frozen=True)
class Item:
    """Source of one or several documents."""

    id: str
    name: str
    version: str
    licence: str
    path: Path
    topic: str | None = None


def distributions() -> list[Distribution]:
    """Return the standard library and the installed distributions, by name, from the names of their folders."""
    paths = sysconfig.get_paths()
    found = {"python": Distribution("python", platform.python_version(), Path(paths["stdlib"]))}
    for folder in sorted({Path(paths["purelib"]), Path(paths["platlib"])}):
        for info in sorted(folder.glob("*.dist-info")):
            name, _, version = info.name.removesuffix(".dist-info").partition("-")
            if name not in SKIPPED_DISTRIBUTIONS:
                found.setdefault(name, Distribution(name, version, folder, info))
    return [found[name] for name in sorted(found)]


def digest() -> str:
    """Return a digest of the names and versions of all distributions; package indexes never change a version."""
    return digest_json([[each.name, each.version] for each in distributions()])


@functools.cache
def items() -> tuple[Item, ...]:
    """Return all items, in the order of a hash of their ids."""
    found = [item for each in distributions() for item in _items(each)]
    return tuple(sorted(found, key=lambda item: hashlib.sha256(item.id.encode()).digest()))


def _items(distribution: Distribution) -> Iterator[Item]:
    name, version = distribution.name, distribution.version
    if distribution.info is None:
        licence = "PSF-2.0"
        paths = (path.relative_to(distribution.folder).as_posix() for path in distribution.folder.rglob("*.py"))
        topics = distribution.folder / "pydoc_data" / "topics.py"
        for topic in sorted(_topics(topics)) if topics.is_file() else ():
            yield Item(f"{name}/topics/{topic}", name, version, licence, topics, topic)
    else:
        metadata = _metadata(distribution.info / "METADATA")
        licence = _licence(metadata)
        paths = _recorded_modules(distribution.info / "RECORD")
        if metadata:
            yield Item(f"{name}/README", name, version, licence, distribution.info / "METADATA")
    for path in paths:
        if SKIPPED_FOLDERS.isdisjoint(path.split("/")[:-1]):
            yield Item(f"{name}/{path}", name, version, licence, distribution.folder / path)


def _recorded_modules(record: Path) -> list[str]:
    """Return the paths of a distribution's Python modules."""
    if not record.is_file():
        return []
    paths = (line.rsplit(",", 2)[0].strip('"') for line in record.read_text(encoding="utf-8").splitlines())
    return [path for path in paths if path.endswith(".py") and not path.startswith(("..", "/"))]


@functools.cache
def _topics(path: Path) -> dict[str, str]:
    """Return pydoc's help topics, a dictionary literal in a module."""
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    return {}


def _metadata(path: Path) -> Message | None:
    return message_from_string(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _licence(metadata: Message | None) -> str:
    """Return the SPDX expression, else a short licence field, else the classifiers."""
    if metadata is None:
        return "unknown"
    if expression := metadata.get("License-Expression"):
        return str(expression)
    field = str(metadata.get("License", "")).strip()
    if field and field != "UNKNOWN" and "\n" not in field and len(field) <= 60:
        return field
    classifiers = [str(each) for each in metadata.get_all("Classifier", [])]
    licences = [each.rsplit(" :: ", 1)[1] for each in classifiers if each.startswith("License :: ")]
    return " AND ".join(licences) or "unknown"


def texts_of(item: Item) -> list[str]:
    """Return the item's texts, which may be none. Raises ``SyntaxError`` or ``ValueError`` if it is not valid
    Python.
    """
    if item.topic is not None:
        return [_topics(item.path)[item.topic].strip()]
    if item.path.name == "METADATA":
        metadata = _metadata(item.path)
        body = "" if metadata is None else str(metadata.get_payload() or metadata.get("Description", ""))
        return [body.strip()] if body.strip() not in ("", "UNKNOWN") else []
    if not item.path.is_file() or item.path.stat().st_size > MAX_SOURCE_BYTES:
        return []
    return module_texts(item.path.read_bytes())


def module_texts(source: bytes) -> list[str]:
    """Return a module's docstrings, each after the name that it documents, as texts of about ``TEXT_CHARS`` characters.

    Repeated paragraphs are left out: functions of a module repeat the descriptions of parameters.
    """
    if b'"""' not in source and b"'''" not in source:
        return []  # parsing takes most of the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    texts: list[str] = []
    seen: set[str] = set()
    for name, node in (("", tree), *_definitions(tree.body, "")):
        paragraphs = (ast.get_docstring(node) or "").split("\n\n")
        fresh = [each for each in paragraphs if each.strip() and each not in seen]
        if not fresh:
            continue
        seen.update(fresh)
        text = "\n\n".join([name, *fresh] if name else fresh)
        if texts and len(texts[-1]) + len(text) <= TEXT_CHARS:
            texts[-1] += f"\n\n{text}"
        else:
            texts.append(text)
    return texts


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Yield classes, functions and methods with their qualified names, except those local to a function."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"class {prefix}{node.name}", node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            shown = ", ".join(each for each in arguments if each not in ("self", "cls"))
            yield f"{prefix}{node.name}({shown})", node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)
