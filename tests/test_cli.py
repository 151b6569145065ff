import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lilpipe(tmp_path):
    def call(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "lilpipe.cli", *arguments],
            cwd=ROOT,
            env={**os.environ, "LILPIPE_STORE": str(tmp_path / "store"), "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


def test_plan_names_what_will_run_and_what_waits(lilpipe):
    done = lilpipe("plan")
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    assert "never run" in rows["prompts"]
    assert "after prompts" in rows["corpus"]
    assert "after corpus" in rows["tokenizer"]
    assert list(rows)[-1] == "register"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--set", "sft.num_epoch=4"), "did you mean sft.num_epochs?"),
        (("run", "--recipe", "huge"), "recipe 'huge': there is no such recipe; known: tiny"),
        (("run", "--config", "absent.toml"), "config file absent.toml: cannot be read"),
        (("run", "--stage", "sft", "--no-track"), "still to be run; run that first, or the full pipeline"),
        (("why", "sfd"), "there is no such step"),
        (("chat",), "no checkpoint of this configuration is in the store"),
    ],
)
def test_a_users_mistake_is_one_clear_error_without_a_trace_back(lilpipe, arguments, message):
    done = lilpipe(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_store_that_cannot_be_written_is_named_with_the_remedy(lilpipe, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = lilpipe("plan", LILPIPE_STORE=str(blocked))
    assert done.returncode == 2
    assert "check LILPIPE_STORE" in done.stderr


def test_a_source_path_that_does_not_exist_is_named_before_anything_runs(lilpipe, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text('[[corpus.sources]]\nkind = "jsonl"\nname = "mine"\npath = "nowhere/*.jsonl"\n')
    done = lilpipe("plan", "--config", str(config))
    assert done.returncode == 2
    assert "mine" in done.stderr
    assert "nowhere/*.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
