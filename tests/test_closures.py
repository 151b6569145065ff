"""What a fingerprint covers: held against an independent import graph, mutations, and what workers load."""

import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from lilpipe import fingerprint
from lilpipe.fingerprint import NEUTRAL_MODULES, code_and_packages, digest_source, is_neutral
from lilpipe.stage import STAGES

ROOT = Path(__file__).parents[1]
PINNED = Path(__file__).with_name("closures.json")
"""Stage to the modules that its fingerprint covers. ``python -m tests.test_closures`` writes it anew."""
UPDATE = "if the new import is meant, run `python -m tests.test_closures`"


def closures():
    return {stage: list(code_and_packages(stage)[0]) for stage in STAGES}


def sources():
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "lilpipe").rglob("*.py")}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in files.items()}


@pytest.fixture(scope="module")
def reachable():
    """Stage to the modules that can change its output, by the graph of another library."""
    graph = grimp.build_graph("lilpipe", exclude_type_checking_imports=True, cache_dir=None)
    for module in list(graph.modules):
        if is_neutral(module) and module != "lilpipe" and module in graph.modules:
            graph.remove_module(module)
    found = {}
    for stage, module in STAGES.items():
        modules = {module, *graph.find_upstream_modules(module)}
        parents = {name.rsplit(".", n)[0] for name in modules for n in range(1, name.count("."))}
        found[stage] = modules | parents
    return found


def test_the_modules_of_each_stage_are_the_pinned_ones():
    pinned, now = json.loads(PINNED.read_text()), closures()
    assert pinned.keys() == now.keys(), UPDATE
    for stage, modules in now.items():
        assert modules == pinned[stage], f"{stage}: {set(modules) ^ set(pinned[stage])}; {UPDATE}"


def test_a_fingerprint_covers_what_another_import_graph_reaches(reachable):
    assert {stage: set(modules) for stage, modules in closures().items()} == reachable


def test_each_neutral_module_exists_and_has_a_reason():
    names = sources()
    for module, reason in NEUTRAL_MODULES.items():
        assert module in names, f"{module}: no such module; remove it from NEUTRAL_MODULES"
        assert len(reason.split()) > 3
        assert module == "lilpipe" or not module.startswith(("lilpipe.config", "lilpipe.alignment", "lilpipe.parallel"))


@pytest.mark.parametrize(
    ("stage", "absent"),
    [
        ("corpus", ("lilpipe.alignment", "lilpipe.training", "lilpipe.model", "lilpipe.config.dpo")),
        ("tokens", ("lilpipe.alignment", "lilpipe.data", "lilpipe.tokenizer.chat_template")),
        ("pretrain", ("lilpipe.alignment", "lilpipe.data", "lilpipe.evaluation", "lilpipe.tokenizer.chat_template")),
        ("sft", ("lilpipe.alignment", "lilpipe.data", "lilpipe.evaluation", "lilpipe.config.corpus")),
    ],
)
def test_a_stage_does_not_depend_on_code_of_others(stage, absent):
    assert not [module for module in code_and_packages(stage)[0] if module.startswith(absent)]


def test_the_choice_of_a_loss_without_reference_is_in_the_fingerprint_of_dpo(monkeypatch):
    assert changed_by(
        "lilpipe.config.dpo", 'REFERENCE_FREE = ("orpo", "simpo")', "REFERENCE_FREE = ()", monkeypatch
    ) == {"dpo"}


def changed_by(module, old, new, monkeypatch):
    """The stages whose code digests change with an edit of a module."""
    source = sources()[module]
    assert old in source
    before = {stage: code_and_packages(stage)[0] for stage in STAGES}
    edit(module, source.replace(old, new), monkeypatch)
    return {stage for stage in STAGES if code_and_packages(stage)[0] != before[stage]}


def edit(module, source, monkeypatch):
    read, digested = fingerprint._read_module, digest_source(source)
    monkeypatch.setattr(fingerprint, "_read_module", lambda name: digested if name == module else read(name))


# --- mutations --------------------------------------------------------------------------------------------------------


def mutations(source):
    """The source once for each function in it, with another first statement."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for position in range(len(functions)):
        tree = ast.parse(source)
        function = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)][position]
        function.body.append(ast.parse("raise KeyError").body[0])
        yield function.name, ast.unparse(tree)


def check_mutations(modules, reachable, monkeypatch, *, most=None):
    texts = sources()
    before = {stage: code_and_packages(stage)[0] for stage in STAGES}
    count = 0
    for module in modules:
        found = list(mutations(texts[module]))
        for name, source in found if most is None else random.Random(module).sample(found, min(most, len(found))):
            with monkeypatch.context() as patch:
                edit(module, source, patch)
                changed = {stage for stage in STAGES if code_and_packages(stage)[0] != before[stage]}
            assert changed == {stage for stage in STAGES if module in reachable[stage]}, f"{module}.{name}"
            count += 1
    return count


def test_a_mutation_changes_every_stage_that_reaches_it(reachable, monkeypatch):
    modules = sorted(set().union(*reachable.values()))
    assert check_mutations(modules[:: max(1, len(modules) // 40)], reachable, monkeypatch, most=1) > 20


@pytest.mark.slow
def test_a_mutation_of_any_function_changes_every_stage_that_reaches_it(reachable, monkeypatch):
    assert check_mutations(sorted(sources()), reachable, monkeypatch) > 2_000


# --- what workers load ------------------------------------------------------------------------------------------------

RECORD = """
import atexit, json, os, sys

def _record():
    if "lilpipe.worker" in " ".join(sys.argv) or os.path.basename(sys.argv[0]) == "worker.py":
        job = json.load(open(sys.argv[1]))
        names = sorted(name for name in sys.modules if name.split(".")[0] == "lilpipe")
        with open(os.path.join(os.environ["RECORD"], f"{job['module']}-{os.getpid()}.json"), "w") as file:
            json.dump(names, file)

atexit.register(_record)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [["--config", "tests/smoke.toml"], ["--recipe", "instruct-gpt", "--config", "tests/recipes.toml"]]
)
def test_workers_load_only_what_is_digested_or_neutral(tmp_path, config):
    (tmp_path / "sitecustomize.py").write_text(RECORD)
    (tmp_path / "loaded").mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "RECORD": str(tmp_path / "loaded"),
        "LILPIPE_STORE": str(tmp_path / "store"),
    }
    subprocess.run([sys.executable, "-m", "lilpipe.cli", "run", *config], cwd=ROOT, env=environment, check=True)
    recorded = sorted((tmp_path / "loaded").glob("*.json"))
    of_module = {module: stage for stage, module in STAGES.items()}
    assert len({path.stem.rsplit("-", 1)[0] for path in recorded}) >= 10
    for path in recorded:
        stage = of_module[path.stem.rsplit("-", 1)[0]]
        loaded = {"lilpipe.worker" if name == "__main__" else name for name in json.loads(path.read_text())}
        missing = {m for m in loaded - set(code_and_packages(stage)[0]) if not is_neutral(m)}
        assert not missing, f"{stage} loads {missing}, which its fingerprint does not cover"


if __name__ == "__main__":
    PINNED.write_text(json.dumps(closures(), indent=1) + "\n")
