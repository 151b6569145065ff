"""Extensions: the parts that a user adds from outside of lilpipe, without editing it.

An extension has a kind and a name. It comes from an installed package, as an entry point of the kind's group, or from
a Python file that the settings name. Its code is digested in ``lilpipe.fingerprint``, so that a change of it changes
the fingerprint of the steps that use it; the path of a file is not part of any fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lilpipe.errors import ConfigError

ExtensionKind = Literal["stage", "source", "filter", "reward", "loss", "recipe", "question family"]

GROUPS: dict[ExtensionKind, str] = {
    "stage": "lilpipe.stages",
    "source": "lilpipe.sources",
    "filter": "lilpipe.filters",
    "reward": "lilpipe.rewards",
    "loss": "lilpipe.losses",
    "recipe": "lilpipe.recipes",
    "question family": "lilpipe.questions",
}
"""Kind of extension to its group of entry points."""


@dataclass(frozen=True)
class Extension:
    """What the settings name: where an extension is found."""

    kind: ExtensionKind
    name: str
    file: str | None = None
    """Absolute path of a Python file; none for an entry point."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def installed(kind: ExtensionKind) -> dict[str, EntryPoint]:
    """The entry points of a kind by name. Raises ``ConfigError`` if two packages share a name."""
    found: dict[str, EntryPoint] = {}
    for entry in _entry_points(tuple(sys.path)):
        if entry.group != GROUPS[kind]:
            continue
        if (other := found.setdefault(entry.name, entry)) is not entry:
            raise ConfigError(
                f"{kind} {entry.name!r}: got two entry points in the group {GROUPS[kind]}, {_origin(other)} and "
                f"{_origin(entry)}, expected one; uninstall one of the packages, or rename one entry point"
            )
    return found


@functools.cache
def _entry_points(_search_path: tuple[str, ...]) -> list[EntryPoint]:
    """All entry points of extensions; read once, as this takes some 40 ms."""
    everything: Any = metadata.entry_points()  # of another type in Python 3.12
    return [entry for group in GROUPS.values() for entry in everything.select(group=group)]


def find(kind: ExtensionKind, name: str, *, file: str | None, built_in: Any = ()) -> Extension | None:
    """Where the name is found; none for a built-in one.

    Names are looked up among the built-in ones, then among the entry points, then in ``file``, which is not read here.
    Raises ``ConfigError`` if the name is unknown, or if an entry point has the name of a built-in part.
    """
    entries = installed(kind)
    if name in built_in:
        if name in entries:
            raise ConfigError(
                f"{kind} {name!r}: {_origin(entries[name])} has the name of a built-in {kind}; rename the entry point"
            )
        return None
    if name in entries:
        return Extension(kind, name)
    if file is None:
        known = ", ".join([*built_in, *entries]) or "none"
        raise ConfigError(
            f"there is no {kind} {name!r}; known: {known}. For your own, set `file`, or install a package with an "
            f"entry point in the group {GROUPS[kind]}"
        )
    return Extension(kind, name, file)


def load(extension: Extension, expected: Any = Callable) -> Any:
    """The object of an extension. Raises ``ConfigError`` if it cannot be imported or is of another type."""
    if extension.file is not None:
        where, found = extension.file, _from_file(extension)
    else:
        entry = entry_point(extension)
        where = _origin(entry)
        try:
            found = entry.load()
        except (Exception, SystemExit) as error:  # whatever a user's package raises
            raise ConfigError(
                f"{extension}: {where} fails on import: {type(error).__name__}: {error}; correct the package"
            ) from error
    if not isinstance(found, expected):
        wanted = "a function" if expected is Callable else f"a {expected.__name__}"
        raise ConfigError(f"{extension}: {where} gives a {type(found).__name__}, expected {wanted}")
    return found


def entry_point(extension: Extension) -> EntryPoint:
    """The entry point of an extension that comes from a package."""
    entries = installed(extension.kind)
    if extension.name not in entries:
        raise ConfigError(
            f"{extension}: there is no such entry point in the group {GROUPS[extension.kind]}; known: "
            f"{', '.join(entries) or 'none'}. Install the package in this environment"
        )
    return entries[extension.name]


def _origin(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name}" if entry.dist is not None else ""
    return f"entry point {entry.name} = {entry.value}{package}"


# --- files --------------------------------------------------------------------------------------------------------


def read_file(extension: Extension) -> str:
    """The source of an extension's file. Raises ``ConfigError`` if it cannot be read or parsed."""
    path = Path(str(extension.file))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"{extension}: file {path} cannot be read ({reason}); expected a Python file, by its path from the "
            "configuration file's folder"
        ) from error
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{extension}: file {path} is not valid Python: {error}; correct the file") from error
    return source


def beside(path: Path, name: str) -> Path | None:
    """The module of a top-level name that lies in the folder of a file, if there is one."""
    candidates = (path.parent / f"{name}.py", path.parent / name / "__init__.py")
    return next((each for each in candidates if each.is_file()), None)


def add_folder(path: Path) -> None:
    """Let a file import the modules that lie beside it; modules that are installed come first."""
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)


def check_beside(extension: Extension, names: Any) -> None:
    """Raise ``ConfigError`` if one of the top-level names lies beside the file but is imported from elsewhere."""
    path = Path(str(extension.file))
    for name in names:
        own = beside(path, name)
        spec = find_spec(name) if own is not None else None
        if own is not None and (spec is None or spec.origin is None or not own.samefile(spec.origin)):
            raise ConfigError(
                f"{extension}: file {path} imports {name!r}, which is found at {spec and spec.origin}, and not "
                f"beside it at {own}; rename {own.name}"
            )


def _from_file(extension: Extension) -> Any:
    module = _load_file(extension)
    if hasattr(module, extension.name):
        return getattr(module, extension.name)
    defined = [name for name, value in vars(module).items() if not name.startswith("_") and name != "annotations"]
    raise ConfigError(
        f"{extension}: file {extension.file} has no {extension.name!r}; it has {', '.join(defined) or 'no names'}. "
        "Correct the name in the settings or in the file"
    )


def _load_file(extension: Extension) -> ModuleType:
    """The file as a module; a file that was changed is another module, so that a process sees the change."""
    path, source = Path(str(extension.file)), read_file(extension)
    digest = hashlib.sha256(str(path).encode() + b"\0" + source.encode()).hexdigest()
    name = f"lilpipe_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    add_folder(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ConfigError(f"{extension}: file {path} is no Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles look for what a module defines
    try:
        exec(
            compile(source, str(path), "exec", dont_inherit=True), vars(module)
        )  # not the loader, whose bytecode may be stale
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        del sys.modules[name]
        raise ConfigError(
            f"{extension}: file {path} fails on import: {type(error).__name__}: {error}; correct the file"
        ) from error
    return module
