import dataclasses
import sys

import pytest

from lilpipe import fingerprint, stage
from lilpipe.fingerprint import CacheKey, code_and_packages, difference

MODULES = {
    "toypackage/__init__.py": "",
    "toypackage/a.py": '"""Doc."""\nimport json\nimport numpy\nfrom lilpipe.model import flops\n\n'
    "def run():\n    return 1\n",
}


@pytest.fixture
def toy_module(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(stage.STAGES, "toy", "toypackage.a")
    fingerprint._read_module.cache_clear()
    yield tmp_path / "toypackage/a.py"
    fingerprint._read_module.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toypackage")]:
        del sys.modules[name]


def digest(path, text):
    path.write_text(text)
    fingerprint._read_module.cache_clear()
    return code_and_packages("toy")[0]["toypackage.a"]


def test_comments_docstrings_and_layout_are_not_code(toy_module):
    text = toy_module.read_text()
    before = digest(toy_module, text)
    assert (
        digest(toy_module, text.replace('"""Doc."""', '"""Another."""  # why').replace("return 1", "return   1"))
        == before
    )
    assert digest(toy_module, text.replace("return 1", "return 2")) != before


def test_modules_are_followed_through_imports_and_packages_by_version(toy_module):
    code, packages = code_and_packages("toy")
    assert "lilpipe.model.flops" in code
    assert "lilpipe.config.model" in code
    import numpy

    assert packages["numpy"] == numpy.__version__
    assert "json" not in packages


def test_every_stage_depends_on_its_own_code_and_not_on_another_stages():
    pretrain, packages = code_and_packages("pretrain")
    assert {"lilpipe.training.pretrain", "lilpipe.training.loop", "lilpipe.model.transformer"} <= pretrain.keys()
    others = (
        "lilpipe.alignment",
        "lilpipe.data.corpus",
        "lilpipe.data.build_filters",
        "lilpipe.tokens.build",
    )
    assert not any(name.startswith(others) for name in pretrain)
    assert packages["torch"].startswith("2.13.0")
    corpus, packages = code_and_packages("corpus")
    assert not any(name.startswith("lilpipe.training") for name in corpus)
    assert {"datatrove", "trafilatura", "jusText", "fasttext-numpy2-wheel"} <= packages.keys()


def test_every_package_in_a_fingerprint_has_a_version():
    for name in stage.STAGES:
        _, packages = code_and_packages(name)
        absent = {package for package, version in packages.items() if version == "not installed"}
        assert absent <= {"bitsandbytes", "torchao", "llama-cpp-python"}, f"{name}: {packages}"  # of extras


BASE = CacheKey("sft", {"a": 1, "b": {"c": [1, 2]}}, {"model": ["0" * 64]}, {}, {"m": "1" * 64}, {"torch": "2"})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"config": {"a": 2, "b": {"c": [1, 2]}}}, "config a: 1 -> 2"),
        ({"config": {"a": 1, "b": {"c": [1, 3]}}}, "config b.c.1: 2 -> 3"),
        ({"inputs": {"model": ["f" * 64]}}, "inputs model.0: 000000000000 -> ffffffffffff"),
        ({"external": {"file": "x"}}, "external file: absent -> x"),
        ({"code": {"m": "2" * 64}}, "code m: 111111111111 -> 222222222222"),
        ({"packages": {"torch": "3"}}, "packages torch: 2 -> 3"),
    ],
)
def test_each_ingredient_changes_the_fingerprint_and_is_named(change, line):
    other = dataclasses.replace(BASE, **change)
    assert other.fingerprint != BASE.fingerprint
    assert difference(BASE, other) == [line]


def test_equal_keys_have_one_fingerprint():
    assert dataclasses.replace(BASE).fingerprint == BASE.fingerprint
    assert difference(BASE, BASE) == []
