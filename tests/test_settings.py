"""`lilpipe config`: what is printed gives the same configuration, and says where each value comes from."""

import re
import tomllib

import pytest

from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.fingerprint import code_and_packages
from lilpipe.recipes import RECIPES, load, resolve
from lilpipe.settings import search, show_config
from tests.test_cli import invoke  # noqa: F401 (a fixture)

OVERRIDES = {
    "sft.num_epochs": 7,
    "corpus.sources": [
        {"kind": "jsonl", "name": 'a "quoted"\n\x7fé😀', "path": "a.jsonl", "columns": {"text": "body"}, "weight": 2},
        {"kind": "text", "name": "b", "path": "b", "languages": ["en"], "weight": 1},
    ],
    "pretrain.phases": [{"from_step": 10, "batch_size": 32}],
    "pretrain.needle": {"num_samples": 3},
    "corpus.quality.max_top_ngram_chars": {"2": 0.3},
    "sft.optimizer.learning_rate": 1e-7,
    "seed": 5,
}


def again(text, tmp_path, **settings):
    file = tmp_path / "printed.toml"
    file.write_text(text, encoding="utf-8")
    return load("tiny", file=file, **settings)


def given(value):
    """All values that are set, as JSON has them; in the settings of a step what is absent is not set."""
    if isinstance(value, PipelineConfig):
        value = value.model_dump(mode="json", by_alias=True)
    if isinstance(value, dict):
        return {key: given(item) for key, item in value.items() if item is not None}
    return [given(item) for item in value] if isinstance(value, list) else value


def identities(config):
    """What of the settings counts in fingerprints, and the code, by step."""
    return {
        name: (config.section(name).identity(), code_and_packages(node.stage, config.section(name).extensions()))
        for name, node in config.steps.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "overrides", [{}, OVERRIDES, {"depth": 4}, {"params": "3M"}], ids=["", "many", "depth", "params"]
)
def test_what_is_printed_gives_the_same_configuration_and_fingerprints(recipe, overrides, tmp_path):
    resolved = resolve(recipe, overrides=overrides)
    found = again(show_config(resolved), tmp_path)
    assert given(found) == given(resolved.config)
    if not overrides:
        assert identities(found) == identities(resolved.config)


def test_parts_of_the_users_own_are_printed_with_their_settings(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from lilpipe.config.section import Section\nfrom lilpipe.stage import Stage\n"
        'class Mine(Section):\n    wait_seconds: int = 1\n    """How long."""\n'
        "mine = Stage(name='mine', output='Report', config=Mine, run=print)\ndef score(p, r): return 1.0\n"
    )
    (folder / "mine.toml").write_text(
        '[steps.a]\nstage = "mine"\nfile = "mine.py"\n[mine]\nwait_seconds = 3\n'
        '[[grpo.rewards]]\nkind = "score"\nfile = "mine.py"\noptions = {a = [1, {b = true}]}\n'
    )
    resolved = resolve("tiny", file=folder / "mine.toml")
    text = show_config(resolved)
    assert f"wait_seconds = 3  # integer · seconds · default 1 · source: {folder}/mine.toml" in text
    assert again(text, tmp_path) == resolved.config
    (setting,) = search("wait_seconds", type(resolved.config))
    assert (setting.name, setting.meaning) == ("mine.wait_seconds", "How long.")


def test_each_setting_has_its_type_default_unit_and_source(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[sft]\nbatch_size = 8\n[sft.launch]\ntimeout_seconds = 9\n")
    text = show_config(resolve("tiny", file=file, overrides={"sft.num_epochs": 4, "depth": 2}))
    lines = {line.split(" = ")[0]: line for line in text.partition("[sft]")[2].partition("\n[")[0].splitlines()}
    assert lines["num_epochs"] == "num_epochs = 4  # integer > 0 · default 3 · source: --set"
    assert lines["batch_size"] == f"batch_size = 8  # integer > 0 · default 16 · source: {file}"
    assert re.search(r"^timeout_seconds = 9  # .* · seconds · default 600 · source: .*mine.toml$", text, re.MULTILINE)
    assert lines["keep_last"].endswith("source: default")
    pretrain = text.partition("[pretrain.model]")[2]
    assert re.search(r"^num_layers = 2  # .* source: depth or params$", pretrain, re.MULTILINE)
    assert re.search(r"^max_seq_len = 128  # .* source: recipe tiny$", pretrain, re.MULTILINE)


def test_a_step_is_printed_with_its_own_settings(tmp_path):
    overrides = {"seed": 3, "sft.num_epochs": 9}
    resolved = resolve("llama3", overrides=overrides)
    for name, node in resolved.config.steps.items():
        text = show_config(resolved, name)
        values = tomllib.loads(text)
        assert list(values) == [node.stage]
        found = again(f'recipe = "llama3"\n{text}', tmp_path, overrides=overrides)
        assert found.section(name) == resolved.config.section(name), name
        if "seed" in values[node.stage] and node.stage not in ("prompts",):
            assert "seed = 3  # integer · default not set · source: seed" in text
        for key in node.settings:
            last, source = key.split(".")[-1], rf"source: steps\.{name}\.settings"
            assert re.search(rf"^{last} = .*{source}$|{source}\n{last} = \[$", text, re.MULTILINE), key
    with pytest.raises(ConfigError, match="step 'x': there is no such step; known: prompts"):
        show_config(resolved, "x")


def test_a_null_that_toml_cannot_hold_is_told(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lilpipe.recipes import load\ndef short(): return load('tiny', overrides={'pretrain.seq_len': 64})\n"
    )
    (tmp_path / "mine.toml").write_text('recipe = "short"\nfile = "mine.py"\n')
    resolved = resolve("tiny", file=tmp_path / "mine.toml", overrides={"pretrain.seq_len": None})
    text = show_config(resolved)
    assert "--set; not in this file, because TOML has no null: repeat --set pretrain.seq_len=null" in text
    assert given(again(text, tmp_path, overrides={"pretrain.seq_len": None})) == given(resolved.config)


def test_settings_are_found_by_name_and_by_description():
    by_name, *others = search("Label_Smoothing")
    assert by_name.name == "dpo.label_smoothing"
    assert all("label_smoothing" in setting.meaning for setting in others)
    assert "dpo.smoothing" in [setting.name for setting in search("cDPO")]
    assert search("no such word") == []


def test_the_command_prints_and_searches(invoke, tmp_path):  # noqa: F811
    done = invoke("config", "sft", "--set", "sft.num_epochs=4", "--seed", "2")
    assert done.exit_code == 0, done.exception
    assert tomllib.loads(done.stdout)["sft"]["num_epochs"] == 4
    assert "seed = 2" in done.stdout
    whole = invoke("config", "--recipe", "r1")
    assert given(again(whole.stdout, tmp_path)) == given(load("r1"))
    found = invoke("config", "--search", "num_epochs", "--set", "sft.num_epochs=4")
    assert "sft.num_epochs = 4\n    integer > 0 · default 3\n" in found.stdout
    missing = invoke("config", "--search", "xyzzy")
    assert "no setting has this word" in str(missing.exception)
