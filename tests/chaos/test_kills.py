"""A run that is killed at any moment and taken up again ends in the same bytes."""

import json
import subprocess
import sys

import pytest

from tests.training.conftest import write_tokens


@pytest.fixture
def tokens(tokenizer, tmp_path):
    texts = {
        "corpus": {"train": ["the cat sat on the mat. "] * 300, "validation": ["the mat sat on the cat. "] * 12},
        "exercises": {"train": ["1 2 3 -> 3 2 1\n"] * 300, "validation": ["2 1 3 -> 3 1 2\n"] * 12},
    }
    return write_tokens(tmp_path / "tokens", tokenizer, texts)


def killed(tmp_path, tokens, num_kills):
    command = [sys.executable, "-m", "tests.chaos.kills", str(tmp_path), str(tokens.path), str(num_kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_five_kills_in_training_a_save_and_a_validation_change_no_byte(tmp_path, tokens):
    report = killed(tmp_path, tokens, 5)
    assert len(report["places"]) == 5
    assert {"save", "validation"} <= set(report["places"])
    assert report["digests"][0] == report["digests"][1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_kills_change_no_byte(tmp_path, tokens):
    report = killed(tmp_path, tokens, 100)
    assert len(report["places"]) == 100
    assert report["places"].count("save") >= 10
    assert report["places"].count("validation") >= 10
    assert report["digests"][0] == report["digests"][1]
