"""Extensions: custom stages, sources, filters, rewards, losses, recipes and question families.

An extension has a kind and a name. It is an entry point of an installed package, in the group of its kind, or an object
in a Python file that the settings name. ``lilpipe.fingerprint`` hashes its code: a change reruns the steps that use it.
The path of a file is not part of a fingerprint.
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
"""Maps each kind of extension to its entry point group."""


@dataclass(frozen=True)
class Extension:
    """Reference to an extension: its kind and name, and where it is defined."""

    kind: ExtensionKind
    name: str
    file: str | None = None
    """Absolute path of the Python file; None for an entry point."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def installed(kind: ExtensionKind) -> dict[str, EntryPoint]:
    """Return the entry points of a kind by name. Raises ``ConfigError`` if two entry points have the same name."""
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
    """Return the entry points of all extensions. Cached, because reading them takes about 40 ms."""
    everything: Any = metadata.entry_points()  # its type differs in Python 3.12
    return [entry for group in GROUPS.values() for entry in everything.select(group=group)]


def find(kind: ExtensionKind, name: str, *, file: str | None, built_in: Any = ()) -> Extension | None:
    """Return the extension of a name, or None if the name is built in.

    Searches the built-in names, then the entry points, then ``file``, which is not read here. Raises ``ConfigError`` if
    the name is unknown, or if an entry point has a built-in name.
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
            f"there is no {kind} {name!r}; known: {known}. For a custom one, set `file`, or install a package "
            f"with an entry point in the group {GROUPS[kind]}"
        )
    return Extension(kind, name, file)


def load(extension: Extension, expected: Any = Callable) -> Any:
    """Import and return the object of an extension.

    Raises ``ConfigError`` if the import fails or the object is not an instance of ``expected``.
    """
    if extension.file is not None:
        where, found = extension.file, _from_file(extension)
    else:
        entry = entry_point(extension)
        where = _origin(entry)
        try:
            found = entry.load()
        except (Exception, SystemExit) as error:  # a user's package can raise anything
            raise ConfigError(
                f"{extension}: {where} fails on import: {type(error).__name__}: {error}; correct the package"
            ) from error
    if not isinstance(found, expected):
        wanted = "a function" if expected is Callable else f"a {expected.__name__}"
        raise ConfigError(f"{extension}: {where} is of type {type(found).__name__}, expected {wanted}")
    return found


def entry_point(extension: Extension) -> EntryPoint:
    """Return the entry point of an extension. Raises ``ConfigError`` if it is not installed."""
    entries = installed(extension.kind)
    if extension.name not in entries:
        raise ConfigError(
            f"{extension}: unknown entry point in the group {GROUPS[extension.kind]}; known: "
            f"{', '.join(entries) or 'none'}. Install the package in this environment"
        )
    return entries[extension.name]


def _origin(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name}" if entry.dist is not None else ""
    return f"entry point {entry.name} = {entry.value}{package}"


# --- files --------------------------------------------------------------------------------------------------------


def read_file(extension: Extension) -> str:
    """Return the source code of an extension's file. Raises ``ConfigError`` if it cannot be read or parsed."""
    path = Path(str(extension.file))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"{extension}: file {path} cannot be read ({reason}); expected a Python file; relative paths start at "
            "the configuration file's folder"
        ) from error
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{extension}: file {path} is not valid Python: {error}; correct the file") from error
    return source


def beside(path: Path, name: str) -> Path | None:
    """Return the path of the top-level module ``name`` in the same folder as a file, or None."""
    candidates = (path.parent / f"{name}.py", path.parent / name / "__init__.py")
    return next((each for each in candidates if each.is_file()), None)


def add_folder(path: Path) -> None:
    """Add the folder of a file to the end of ``sys.path``, so that it can import modules from its folder."""
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)


def check_beside(extension: Extension, names: Any) -> None:
    """Raise ``ConfigError`` if a module in the file's folder is shadowed by another module of the same name."""
    path = Path(str(extension.file))
    for name in names:
        own = beside(path, name)
        spec = find_spec(name) if own is not None else None
        if own is not None and (spec is None or spec.origin is None or not own.samefile(spec.origin)):
            raise ConfigError(
                f"{extension}: file {path} imports {name!r}, which resolves to {spec and spec.origin} instead of "
                f"{own} in its folder; rename {own.name}"
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
    """Import a file as a module, named by its digest, so that a changed file is imported again."""
    path, source = Path(str(extension.file)), read_file(extension)
    digest = hashlib.sha256(str(path).encode() + b"\0" + source.encode()).hexdigest()
    name = f"lilpipe_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    add_folder(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ConfigError(f"{extension}: file {path} is not a Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module here
    try:
        # Not spec.loader, because its cached bytecode can be stale.
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # a user's file can raise anything
        del sys.modules[name]
        raise ConfigError(
            f"{extension}: file {path} fails on import: {type(error).__name__}: {error}; correct the file"
        ) from error
    return module
