"""Extensions from files: the code that is part of the fingerprint, and the messages of errors."""

import sys

import pytest

from lilpipe.alignment.rewards.reward_functions import Rewards
from lilpipe.config.prompts import RewardConfig
from lilpipe.errors import ConfigError
from lilpipe.fingerprint import code_and_packages
from lilpipe.pipeline.plan import plan
from lilpipe.recipes import load


def test_packages_count_by_version_and_modules_beside_the_file_by_content(tmp_path):
    (tmp_path / "beside.py").write_text("from yaml import safe_load\nSIZE = 1\n")
    (tmp_path / "mine.py").write_text(
        "import numpy\nimport json\nfrom beside import SIZE\ndef mine(p, r): return SIZE\n"
    )
    extension = RewardConfig(kind="mine", file=str(tmp_path / "mine.py")).extension()
    assert extension is not None
    code, packages = code_and_packages("sft", [extension])
    built_in, built_in_packages = code_and_packages("sft")
    assert code.keys() - built_in.keys() == {"reward 'mine'", "beside"}
    assert not any(str(tmp_path) in name for name in code)
    assert packages.keys() - built_in_packages.keys() == {"PyYAML"} - built_in_packages.keys()
    assert "numpy" in packages
    (tmp_path / "beside.py").write_text("from yaml import safe_load\nSIZE = 2\n")
    changed = code_and_packages("sft", [extension])[0]
    assert {name for name in code if code[name] != changed[name]} == {"beside"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"reward 'mine': file .*mine\.py cannot be read \(No such file or directory\); expected a Python file"),
        ("def mine(:\n", r"reward 'mine': file .*mine\.py is not valid Python: invalid syntax.*line 1"),
        ("def other(p, r): return 1\n", r"mine\.py has no 'mine'; it has other"),
        ("import absent_module\n", r"mine\.py fails on import: ModuleNotFoundError: No module named 'absent_module'"),
        ("mine = 3\n", r"reward 'mine': .*mine\.py is of type int, expected a function"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_the_plan(tmp_path, store, source, message):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    rewards = [{"kind": "mine", "file": str(tmp_path / "mine.py")}]
    config = load("tiny", overrides={"grpo.rewards": rewards})
    with pytest.raises(ConfigError, match=message):
        assert [plan(config, store), Rewards(config.grpo.rewards)]  # the latter checks what the former imports


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[steps.a]\nstage = "absent"\n', "steps.a.stage: unknown stage 'absent'"),
        ('[steps.a]\nstage = "sft"\nfile = "mine.py"\n', "stage 'sft': file .*mine.py would be ignored"),
        ('[steps.a]\nstage = "seed"\nfile = "mine.py"\n', "stage 'seed': expected letters"),
        ('[steps.a]\nstage = "other"\nfile = "mine.py"\n', r"'other': got Stage\(name='mine'\), expected 'other'"),
        ('[steps.a]\nstage = "bare"\nfile = "mine.py"\n', "its section Bare has settings without a default"),
        ('[steps.a]\nstage = "mine"\nfile = "mine.py"\n[mine]\nsise = 1\n', "did you mean mine.size?"),
        ('[steps.a]\nstage = "mine"\nfile = "mine.py"\n[mine]\nsize = 0\n', "mine.size: .*greater than 0"),
        ('recipe = "tiny"\nfile = "mine.py"\n', "recipe 'tiny': file .*mine.py would be ignored"),
        ('recipe = "wrong"\nfile = "mine.py"\n', "recipe 'wrong': returned a int, expected a PipelineConfig"),
        ('[dpo]\nloss_type = "x"\n', r"dpo: there is no loss 'x'; known: sigmoid.* `file`"),
    ],
)  # fmt: skip
def test_wrong_settings_of_parts_are_refused(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(
        "from pydantic import PositiveInt\nfrom lilpipe.config.section import Section\n"
        "from lilpipe.stage import Stage\n"
        "class Mine(Section):\n    size: PositiveInt = 1\nclass Bare(Section):\n    size: int\n"
        "def run(config, inputs, workspace): return {}\n"
        "mine = other = Stage(name='mine', output='Report', config=Mine, run=run)\n"
        "seed = Stage(name='seed', output='Report', config=Mine, run=run)\n"
        "bare = Stage(name='bare', output='Report', config=Bare, run=run)\ndef wrong(): return 3\n"
    )
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load("tiny", file=tmp_path / "mine.toml")


def test_a_module_that_would_be_imported_from_elsewhere_is_refused(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_test.py").write_text("SIZE = 1\n")
        (tmp_path / folder / "mine.py").write_text("from helper_of_test import SIZE\ndef mine(p, r): return SIZE\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "one")])
    extension = RewardConfig(kind="mine", file=str(tmp_path / "two" / "mine.py")).extension()
    assert extension is not None
    with pytest.raises(ConfigError, match=r"imports 'helper_of_test', which resolves to .*one.*; rename"):
        code_and_packages("grpo", [extension])
