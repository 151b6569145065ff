"""What the pages show exists and works: commands, options, make targets, settings, error messages."""

import ast
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from docs.generate.commands import make_targets
from docs.generate.errors import PLACEHOLDER
from docs.generate.settings import all_settings
from lilpipe.cli import app
from lilpipe.config.overrides import parse_override, set_dotted
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.recipes import get_recipe, load
from tests.docs.pages import ALL, PAGES, ROOT, SHELL, TOML, blocks, commands

COPIED = ("Makefile", "deploy", "docs", "flows", "lilpipe", "pyproject.toml", "tasks", "tests")
"""What a scratch checkout holds."""
SMALL = ROOT / "tests" / "docs" / "small.toml"


def calls(program):
    return [
        pytest.param(words[1:], id=f"{block}-{' '.join(words)}"[:120])
        for block in SHELL
        for words in commands(block)
        if words[0] == program
    ]


# --- what is shown exists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", calls("lilpipe"))
def test_a_lilpipe_command_and_its_options_exist(words):
    command = cast(Any, typer.main.get_command(app)).commands[words[0]]
    command.make_context(words[0], list(words[1:]))  # parses options and values; raises for what it does not know
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            key, setting = parse_override(value)
            values = get_recipe("tiny").model_dump(by_alias=True)
            set_dotted(values, key, setting, model=PipelineConfig, where=value)


@pytest.mark.parametrize("words", calls("make"))
def test_a_make_target_and_its_variables_exist(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert f"$({name})" in makefile or f"$(if $({name})" in makefile or f"{name} ?=" in makefile
        else:
            assert name in make_targets(ROOT / "Makefile")


@pytest.mark.parametrize("words", calls("prefect"))
def test_a_deployment_and_its_parameters_exist(words):
    if words[:2] != ["deployment", "run"]:
        assert words[:2] == ["flow-run", "retry"]
        return
    from flows.full_pipeline import full_pipeline
    from flows.stage import run_one_stage

    flow_name, _, deployment = words[2].partition("/")
    flow = {"full-pipeline": full_pipeline, "stage": run_one_stage}[flow_name]
    prefect_yaml = (ROOT / "deploy" / "prefect.yaml").read_text(encoding="utf-8")
    assert not deployment or f"name: {deployment}\n" in prefect_yaml
    for flag, value in itertools.pairwise(words):
        if flag == "-p":
            assert value.partition("=")[0] in inspect.signature(flow.fn).parameters


@pytest.mark.parametrize("words", calls("python"))
def test_a_python_file_exists(words):
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("block", TOML, ids=str)
def test_a_block_of_settings_is_a_valid_configuration(block, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(block.text, encoding="utf-8")
    for other in ALL:
        if other.page == block.page and other.language == "python" and other.title:  # that the settings may name
            (tmp_path / other.title).write_text(other.text, encoding="utf-8")
    load("tiny", file=file)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_settings_and_files_that_the_text_names_exist(path):
    """Inline code such as `sft.num_epochs`, `[corpus.pii]` or `lilpipe/config/sft.py`."""
    known = set(all_settings())
    prefixes = {name.rpartition(".")[0] for name in known}
    prefixes |= {prefix.rpartition(".")[0] for prefix in prefixes}
    sections = {name.split(".")[0] for name in known if "." in name}
    for code in inline_code(path):
        code = code.partition(" = ")[0]
        table = re.fullmatch(r"\[{1,2}([a-z_.]+)\]{1,2}", code)
        dotted = re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", code)
        if table and not table[1].startswith(("steps", "tool.")):
            assert table[1] in prefixes | known, code
        elif (
            dotted
            and code.split(".")[0] in sections
            and not re.search(r"\.(toml|jsonl?|html|arrow|npy|tiktoken)$", code)
        ):
            assert code in known | prefixes, code
        elif re.fullmatch(r"(lilpipe|flows|tasks|tests|docs|deploy)/[\w/.-]*", code) and "<" not in code:
            assert (ROOT / code).exists() or code in ("docs/", "docs/images/"), code


def inline_code(path):
    text = path.read_text(encoding="utf-8")
    for block in blocks(path):
        text = text.replace(block.text, "")
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


# --- error messages -----------------------------------------------------------------------------------------------


@cache
def message_templates():
    """Every text in the library, with its values left out."""
    found = set()
    for path in (ROOT / "lilpipe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values]
                found.add("".join(map(str, parts)))
    return found


def headings():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `([^`]+)`$", text, re.MULTILINE)


@pytest.mark.parametrize("heading", headings())
def test_an_explained_error_message_is_one_of_the_code(heading):
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split(PLACEHOLDER)), re.DOTALL)
    assert any(pattern.search(template) for template in message_templates())


def test_enough_messages_are_explained():
    assert len(headings()) >= 15


# --- what is shown works ------------------------------------------------------------------------------------------


def make_checkout(folder):
    """A scratch checkout with a small `mine.toml`; returns a function that runs a block in it."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    shutil.copy2(SMALL, folder / "mine.toml")
    command = folder / "bin" / "lilpipe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lilpipe.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LILPIPE_")},
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }

    def run(block):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("checkout"))


def marked(mark):
    return [block for block in SHELL if block.mark == mark]


@pytest.mark.parametrize("block", marked("run"), ids=str)
def test_a_block_runs(block, checkout):
    assert checkout(block).strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in marked("slow")}))
def test_a_page_runs_from_its_beginning_to_its_end(page, tmp_path):
    """Files that the page shows by title are written, at sizes that run in a minute."""
    run = make_checkout(tmp_path)
    small = SMALL.read_text(encoding="utf-8")
    for block in ALL:
        if block.page == page and block.title:
            text = f"{block.text}\n{small}"
            tomllib.loads(text)
            (tmp_path / block.title).write_text(text, encoding="utf-8")
        if block.page == page and block.mark == "slow":
            assert run(block).strip()
