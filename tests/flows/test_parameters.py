from typing import get_args

import pytest

from flows import parameters
from lilpipe.errors import ConfigError
from lilpipe.recipes import RECIPES


def test_the_form_offers_every_recipe():
    assert set(get_args(parameters.Recipe)) == set(RECIPES)


def test_overrides_win_over_the_file_and_the_seed_over_both(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 3\n[sft]\nnum_epochs = 7\nbatch_size = 8\n")
    config = parameters.configure("tiny", str(file), {"sft.num_epochs": 4}, None)
    assert (config.seed, config.sft.num_epochs, config.sft.batch_size) == (3, 4, 8)
    assert parameters.configure("tiny", str(file), {}, 5).seed == 5


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        parameters.configure("tiny", str(tmp_path / "mine.toml"), {}, None)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"recipe": "tiny", "config": None, "overrides": {}, "seed": None}, "tiny, seed 0"),
        ({"recipe": "tiny", "config": None, "overrides": {"seed": 2}, "seed": None}, "tiny, seed 2"),
        ({"recipe": "tiny", "config": "absent.toml", "overrides": {}, "seed": 4}, "tiny, seed 4"),
        ({"recipe": "tiny", "config": None, "overrides": {}, "seed": 1, "stage": "sft"}, "sft of tiny, seed 1"),
    ],
)
def test_a_flow_run_is_named_by_recipe_and_seed(monkeypatch, given, name):
    monkeypatch.setattr(parameters.flow_run, "get_parameters", lambda: given, raising=False)
    assert parameters.run_name() == name
