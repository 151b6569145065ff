"""Imports point one way: flows -> tasks -> lilpipe; and inside lilpipe, Prefect nowhere and MLflow in one place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "lilpipe": {"flows", "tasks", "deploy", "prefect", "tests"},
    "tasks": {"flows", "tests"},
    "flows": {"tests"},
}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", sorted(FORBIDDEN))
def test_a_layer_does_not_import_what_stands_above_it(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): bad for path in files if (bad := imported(path) & FORBIDDEN[layer])}
    assert not wrong


def test_mlflow_is_imported_by_the_tracker_alone():
    users = {path for layer in FORBIDDEN for path in (ROOT / layer).rglob("*.py") if "mlflow" in imported(path)}
    assert {path.parent for path in users} == {ROOT / "lilpipe" / "tracking"}, users


def test_nothing_is_unpickled():
    for layer in FORBIDDEN:
        for path in (ROOT / layer).rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
            assert "torch.load" not in path.read_text(), path
