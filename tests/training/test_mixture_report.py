import re

import pytest

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.tokens.data_phase_plan import open_loader, plan_data_phases
from lilpipe.tokens.shards import TokenShards
from lilpipe.training.mixture_report import measure_mixture, mixture_section, unmet_shares
from tests.training.conftest import write_tokens

MODEL = ModelConfig(max_seq_len=32)


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    """1280 tokens of prose, 128 of verse."""
    texts = {
        "prose": {"train": ["the cat sat on the mat, and on."] * 40, "validation": ["the mat"]},
        "verse": {"train": ["oh cat, oh mat."] * 8, "validation": ["oh"]},
    }
    return TokenShards.open(write_tokens(tmp_path_factory.mktemp("mixture"), tokenizer, texts).path)


def test_each_phase_has_a_table_of_what_was_asked_reached_and_read_so_far(shards):
    annealing = {"from_step": 20, "seq_len": 32, "mixture": {"weights": {"prose": 1, "verse": 1}, "max_epochs": 2}}
    config = PretrainConfig.model_validate(
        {
            "seed": 1,
            "model": MODEL,
            "seq_len": 16,
            "num_steps": 30,
            "batch_size": 2,
            "exercise_ratio": 0.0,
            "mixture": {"weights": {"prose": 9, "verse": 1}},
            "phases": [{"from_step": 10, "batch_size": 4}, annealing],
        }
    )
    planned, loader = plan_data_phases(config, shards), open_loader(config, shards)
    page = "".join(mixture_section(planned, loader))
    assert re.findall(r"Steps \d+ to \d+, sequences of \d+ tokens", page) == [
        "Steps 0 to 19, sequences of 16 tokens",
        "Steps 20 to 29, sequences of 32 tokens",
    ]
    # 960 tokens, a tenth of them verse; then 640, of which verse gives the 160 that two epochs of it leave.
    assert list(unmet_shares(planned)) == [
        "mixture from step 20: prose gives 75.0% of the requested 50.0%: takes tokens that other streams cannot "
        "provide",
        "mixture from step 20: verse gives 25.0% of the requested 50.0%: at its limit of epochs",
    ]
    assert planned[1].parts["verse"].epochs == pytest.approx(2.0)
    assert measure_mixture(loader)["epochs_verse"] == pytest.approx(2.0, abs=0.15)
    assert measure_mixture(loader)["share_verse"] == pytest.approx(256 / 1600, abs=0.01)
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", page, re.S)]
    verse = [row for row in cells if row[:1] == ["verse"]]
    assert [row[1] for row in verse] == ["128", "128"]
    assert [float(row[2]) for row in verse] == [10.0, 50.0]
    assert float(verse[0][4]) == pytest.approx(96 / 128, abs=0.1)
    assert "at its limit of epochs" in " ".join(verse[1])
