"""The documentation that every Python environment carries, read without importing a package.

Docstrings of the standard library and of the installed distributions by ``ast`` (a document for each module, or several
for a large one), the help topics of ``pydoc``, and the READMEs in the distributions' metadata.
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
"""Tests say little; vendored packages have another version and licence than the distribution that holds them."""

MAX_SOURCE_BYTES = 2_000_000
"""Larger modules are generated tables."""

TEXT_CHARS = 4_000
"""A module's docstrings are cut into texts of this size, about a web page's, for which the filters are made."""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, or the standard library."""

    name: str
    version: str
    folder: Path
    """Where its modules' relative paths start."""
    info: Path | None = None
    """The `.dist-info` folder."""


@dataclass(frozen=True)
class Item:
    """What one document is made from, or several."""

    id: str
    name: str
    version: str
    licence: str
    path: Path
    topic: str | None = None


def distributions() -> list[Distribution]:
    """The installed distributions by name, from the names of their folders alone, and the standard library."""
    paths = sysconfig.get_paths()
    found = {"python": Distribution("python", platform.python_version(), Path(paths["stdlib"]))}
    for folder in sorted({Path(paths["purelib"]), Path(paths["platlib"])}):
        for info in sorted(folder.glob("*.dist-info")):
            name, _, version = info.name.removesuffix(".dist-info").partition("-")
            if name not in SKIPPED_DISTRIBUTIONS:
                found.setdefault(name, Distribution(name, version, folder, info))
    return [found[name] for name in sorted(found)]


def digest() -> str:
    """Digest over the names and versions of all that is installed; the package indexes never change a version."""
    return digest_json([[each.name, each.version] for each in distributions()])


@functools.cache
def items() -> tuple[Item, ...]:
    """Everything that a document can be made from, in the order of a hash of its id."""
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
    """Paths of the Python modules that a distribution installed."""
    if not record.is_file():
        return []
    paths = (line.rsplit(",", 2)[0].strip('"') for line in record.read_text(encoding="utf-8").splitlines())
    return [path for path in paths if path.endswith(".py") and not path.startswith(("..", "/"))]


@functools.cache
def _topics(path: Path) -> dict[str, str]:
    """The topics of pydoc's help: a literal dictionary in a module."""
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    return {}


def _metadata(path: Path) -> Message | None:
    return message_from_string(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _licence(metadata: Message | None) -> str:
    """The SPDX expression if there is one, a short licence field, or the classifier."""
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
    """The item's texts, none if it documents nothing. Raises ``SyntaxError`` or ``ValueError`` if it is no Python."""
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
    """A module's docstrings, each under the name that it documents, in texts of about ``TEXT_CHARS``.

    A paragraph that has been there before is left out: functions of a module repeat their parameters' descriptions.
    """
    if b'"""' not in source and b"'''" not in source:
        return []  # worth it: parsing is most of the work
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
    """Classes, functions and methods with their qualified names, but not what is local to a function."""
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
