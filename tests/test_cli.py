import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lilpipe.cli import app
from lilpipe.errors import LilpipeError

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


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """The same in this process, which spares the imports; errors are raised."""
    monkeypatch.setenv("LILPIPE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_plan_names_what_will_run_and_what_waits(lilpipe):
    done = lilpipe("plan")
    assert done.returncode == 0, done.stderr
    steps, _ = done.stdout.split("\npretrain ")
    rows = {line.split("│")[1].strip(): line for line in steps.splitlines() if line.startswith("│")}
    assert "never run" in rows["prompts"]
    assert "after prompts" in rows["corpus"]
    assert "after corpus" in rows["tokenizer"]
    assert list(rows)[-1] == "register"


def test_plan_says_what_pretraining_will_take_on_the_device_that_is_named(invoke):
    done = invoke("plan", "--device", "h100", "--mfu", "0.5", "--price", "3", "--set", "depth=12")
    assert done.exit_code == 0, done.exception
    _, budget = done.stdout.split("\npretrain ")
    rows = {cells[1].strip(): cells for line in budget.splitlines() if len(cells := line.split("│")) > 3}
    assert "75,123,456" in rows["parameters"][2]
    assert "2 x h100 x 6.7e+13 FLOP/s x MFU 0.5" in rows["time"][3].replace("1 x", "2 x")  # one worker on one core
    assert {"weights", "gradients", "optimizer state", "activations", "peak memory per worker"} <= set(rows)
    assert "warning" not in budget


def test_plan_warns_of_memory_that_the_device_does_not_have(invoke):
    done = invoke("plan", "--device", "rtx-4090", "--set", "params=8B", "--set", "pretrain.num_workers=1")
    assert done.exit_code == 0, done.exception
    assert "warning: peak memory" in done.stdout
    assert "increase parallel.shard from 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--device", "h10"), "unknown device 'h10'; did you mean h100?"),
        (("plan", "--set", "depth=deep"), "depth: got 'deep', expected a whole number above 0"),
        (("scaling", "--depths", "1,deep,3"), "--depths: got '1,deep,3', expected comma-separated numbers above 0"),
        (("scaling", "--from-store"), "contains no finished pretraining run"),
        (("scaling", "--depths", "1,2"), "got 2 runs, expected at least 3"),
    ],
)
def test_settings_that_cannot_be_planned_are_refused_by_name(invoke, arguments, message):
    done = invoke(*arguments)
    assert isinstance(done.exception, LilpipeError)
    assert message in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--set", "sft.num_epoch=4"), "did you mean sft.num_epochs?"),
        (("run", "--recipe", "huge"), "there is no recipe 'huge'; known: tiny"),
        (("run", "--config", "absent.toml"), "config file absent.toml: cannot be read"),
        (("run", "--stage", "sft", "--no-track"), "its inputs are not built yet: pretrain (after tokens)"),
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
