"""Recipe ``adapt``: its steps, and what follows from the base."""

import pytest

from lilpipe.adapt_recipe import rate
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import save_model
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.recipes import load
from tests.model.checkpoints import SMALL, small_model, small_tokenizer

ON = ["import_model", "prompts", "sft", "evaluate", "register", "release"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(small_model(), small_tokenizer(), directory)
    return directory


def enabled(*names):
    return load("adapt", overrides={f"enable.{name}": True for name in names})


def test_the_short_form_fine_tunes_the_base():
    config = load("adapt")
    assert list(config.steps) == ON
    assert config.steps["sft"].inputs == {"model": "import_model", "prompts": "prompts"}
    assert config.steps["evaluate"].inputs["models"] == ("import_model", "sft")
    assert config.steps["release"].inputs == {"model": "sft", "report": "evaluate"}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("preferences", "dpo"),
        ("grpo",),
        ("benchmarks",),
        ("corpus", "tokens", "pretrain"),
        ("corpus", "tokens", "pretrain", "preferences", "dpo", "grpo", "benchmarks"),
    ],
)
def test_every_choice_of_steps_is_wired(names):
    config = enabled(*names)
    assert set(config.steps) == {*ON, *names}
    for step in config.steps:
        check_wiring(config, step)


def test_rates_fall_with_size_and_rise_with_adapters():
    assert rate("sft", 7e9, lora=False) == 2e-5
    assert rate("sft", 7e9, lora=True) == 2e-4
    assert rate("dpo", 1.75e9, lora=False) == 1e-6
    assert rate("sft", 1e6, lora=True) == 1e-3


def test_rates_and_shape_follow_from_a_local_base(base):
    config = load(
        "adapt", overrides={"import_model.path": str(base), "dpo.lora": {}, "sft.optimizer.learning_rate": 1e-4}
    )
    size = num_parameters(SMALL, small_tokenizer().vocab_size)
    assert config.sft.optimizer.learning_rate == 1e-4
    assert config.dpo.optimizer.learning_rate == rate("dpo", size, lora=True)
    assert config.grpo.optimizer.learning_rate == rate("grpo", size, lora=False)
    assert config.pretrain.model == SMALL
    assert config.pretrain.seq_len == SMALL.max_seq_len


def test_other_recipes_keep_their_rates(base):
    config: PipelineConfig = load("tiny", overrides={"import_model.path": str(base)})
    assert config == load("tiny").model_copy(update={"import_model": config.import_model})
