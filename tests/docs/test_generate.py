"""The generated reference pages."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from docs.generate import api, commands, errors, picture, settings, stages
from lilpipe.config.pipeline import DEFAULT_STEPS, PipelineConfig
from lilpipe.config.section import Operational, Section
from lilpipe.stage import STAGES

ROOT = Path(__file__).parents[2]


def named(values, prefix=""):
    """Dotted names of all values, as pydantic dumps them."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from named(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_setting_has_an_entry_of_its_own():
    pages = settings.pages()
    entries = [name for page in pages.values() for name in re.findall(r"^`([^`]+)`\{#", page, re.MULTILINE)]
    assert len(entries) == len(set(entries))
    dumped = PipelineConfig(recipe="tiny").model_dump(mode="json", by_alias=True)
    for name in named({key: value for key, value in dumped.items() if key != "steps"}):
        # Values of tables whose keys are the user's stand under the table's own name.
        assert any(name == entry or name.startswith(f"{entry}.") for entry in entries), name
    assert {"steps.NAME.stage", "corpus.sources.path", "sft.lora.r", "pretrain.phases.from_step"} <= set(entries)


def test_operational_settings_are_those_that_the_fingerprint_leaves_out():
    marked = {name for name, setting in settings.all_settings().items() if setting.effect == "operational"}
    config = PipelineConfig(recipe="tiny")
    for section in ("corpus", "sft", "pretrain", "evaluate"):
        values = getattr(config, section)
        in_fingerprint = set(named(values.identity(), f"{section}."))
        everything = set(named(values.model_dump(mode="json"), f"{section}."))
        left_out = {name for name in everything - in_fingerprint if not any(n.startswith(f"{name}.") for n in marked)}
        assert left_out == {name for name in marked & everything if name.split(".")[0] == section}


class Inner(Section):
    """Inner section."""

    depth: int = 3
    """How deep."""


class Outer(Section):
    """Outer section."""

    kind: Literal["a", "b"] = "a"
    """Which."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    names: tuple[PositiveInt, ...] = ()
    timeout_seconds: Annotated[float | None, Operational] = None
    """How long."""
    inner: Inner = Inner(depth=4)


def test_a_section_is_shown_with_types_defaults_units_and_marks():
    outer, inner = settings.tables(Outer, "[outer]", Outer(), Outer(share=0.25))
    kind, share, names, timeout = outer.settings
    assert (kind.type, kind.default, kind.meaning) == ('`"a"` or `"b"`', '"a"', "Which.")
    assert (share.type, share.default, share.recipe_default) == ("number from 0 to 1", "0.5", "0.25")
    assert (names.type, names.default) == ("list of integers > 0", "empty")
    assert (timeout.unit, timeout.default, timeout.effect) == ("seconds", "not set", "operational")
    assert (inner.header, inner.meaning) == ("[outer.inner]", "Inner section.")
    assert [(setting.name, setting.default) for setting in inner.settings] == [("outer.inner.depth", "4")]


def test_an_error_message_is_found_with_its_values_left_out(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        'def f(x):\n    raise ConfigError(f"seed: got {x}, " "expected 0")\n'
        '    raise ValueError("of ours")\n    raise DataError(message)\n'
    )
    assert list(errors.messages(module, is_config=False)) == [("ConfigError", "seed: got …, expected 0")]
    assert ("ConfigError", "of ours") in list(errors.messages(module, is_config=True))


def test_make_targets_are_those_with_a_comment(tmp_path):
    makefile = tmp_path / "Makefile"
    makefile.write_text("A := b\n\nrun: setup other ## Run it\n\techo\n\nother:\n\techo\n")
    assert commands.make_targets(makefile) == {"run": "Run it"}


def test_every_module_is_in_the_api_reference():
    text = "\n".join(api.pages(ROOT / "lilpipe").values())
    for path in (ROOT / "lilpipe").rglob("*.py"):
        if not path.name.startswith("_"):
            assert f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n" in text


def test_layers_are_those_of_the_import_contract(tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[[tool.importlinter.contracts]]\nlayers = ["flows"]\n'
        '[[tool.importlinter.contracts]]\ncontainers = ["lilpipe"]\nlayers = ["cli", "model | tokens", "a : b"]\n'
    )
    assert api.layers(pyproject, "lilpipe") == [["cli"], ["model", "tokens"], ["a", "b"]]


def test_every_stage_and_every_step_is_shown():
    (page,) = stages.pages().values()
    assert all(f"| [`{name}`]" in page for name in STAGES)
    drawn = picture.draw().replace("</text>", "\n")
    for name in DEFAULT_STEPS:
        assert all(part in drawn for part in name.split("_"))
