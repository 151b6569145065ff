import pytest

from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.overrides import parse_override
from lilpipe.config.pipeline import DEFAULT_STEPS, PipelineConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.recipes import load


def write(path, text):
    path.write_text(text)
    return path


def test_a_users_own_data_is_four_lines(tmp_path):
    file = write(
        tmp_path / "mine.toml", '[[corpus.sources]]\nkind = "jsonl"\nname = "mine"\npath = "docs/*.jsonl.gz"\n'
    )
    config = load("tiny", file=file)
    assert [source.path for source in config.corpus.sources] == ["docs/*.jsonl.gz"]
    assert config.pretrain == load("tiny").pretrain


def test_tables_of_a_file_merge_over_the_recipe_and_overrides_go_over_both(tmp_path):
    file = write(tmp_path / "c.toml", "seed = 3\n[sft]\nnum_epochs = 7\n[sft.optimizer]\nlearning_rate = 0.5\n")
    config = load("tiny", file=file, overrides={"sft.num_epochs": 9})
    assert config.seed == 3
    assert config.sft.num_epochs == 9
    assert config.sft.optimizer.learning_rate == 0.5
    assert config.sft.optimizer.schedule == load("tiny").sft.optimizer.schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sft]\nnum_epoch = 2\n", "there is no setting 'sft.num_epoch'; did you mean sft.num_epochs?"),
        ("[sft]\nnum_epochs = 0\n", "sft.num_epochs: Input should be greater than 0 (got 0)"),
        ("[[grpo.rewards]]\nkind = 'answer'\nweight = nan\n", "grpo.rewards.0.weight: Input should be a finite number"),
        ("[evaluate.sampling]\nrepetition_penalty = inf\n", "repetition_penalty: Input should be a finite number"),
        ("[pretrain]\nbatch_size = 15\nnum_workers = 2\n", "batch_size 15 must be a multiple of replicate x shard"),
        ('[[corpus.sources]]\nkind = "jsonl"\nname = "x"\n', "requires `path`"),
        ("[corpus\n", "is not valid TOML"),
        ('recipe = "huge"\n', "there is no recipe 'huge'; known: tiny"),
        ('[steps.sft]\nstage = "sft"\ninputs = {model = "grpo"}\n', "expected one of the steps before it"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field_and_the_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load("tiny", file=write(tmp_path / "c.toml", text))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        load("tiny", file=tmp_path / "absent.toml")


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean dpo\.beta"):
        load("tiny", overrides={"dpo.bet": 1})


def test_override_values_are_json_or_else_text():
    assert parse_override("sft.num_epochs=4") == ("sft.num_epochs", 4)
    assert parse_override("corpus.languages=[]") == ("corpus.languages", [])
    assert parse_override("pretrain.optimizer.kind=muon") == ("pretrain.optimizer.kind", "muon")
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_override("sft.num_epochs")


def test_head_counts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        ModelConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="must be even for RoPE"):
        ModelConfig(hidden_size=36, num_heads=4, num_kv_heads=2)


def test_sources_of_one_name_are_refused():
    source = {"kind": "jsonl", "name": "a", "path": "x"}
    with pytest.raises(ValueError, match="names must be unique"):
        CorpusConfig.model_validate({"sources": [source, source]})


def test_settings_that_cannot_change_an_output_are_not_in_the_identity():
    identity = PretrainConfig().identity()
    assert "checkpoint_every" not in identity
    assert "log_every" not in identity
    assert identity["num_workers"] == 1  # sums in another order
    assert CorpusConfig(num_workers=1).identity() == CorpusConfig(num_workers=2).identity()


def test_the_pipelines_seed_fills_in_where_a_stage_names_none():
    config = PipelineConfig.model_validate({"recipe": "x", "seed": 5, "grpo": {"seed": 8}})
    assert config.section("sft").seed == 5
    assert config.section("grpo").seed == 8


def test_a_step_may_differ_from_its_stages_section():
    steps = {
        "prompts": {"stage": "prompts", "settings": {"num_validation": 7}},
        "more": {"stage": "prompts"},
    }
    config = PipelineConfig.model_validate({"recipe": "x", "steps": steps})
    assert config.section("prompts").num_validation == 7
    assert config.section("more").num_validation == 300


def test_the_default_wiring_is_complete():
    from lilpipe.pipeline.plan import plan  # noqa: F401  # imports every stage's contract
    from lilpipe.stage import STAGES

    config = load("tiny")
    # The first stands in for pretraining where a run starts from a model from elsewhere; the others belong to recipes.
    optional = {"benchmarks", "release", "import_model", "reward_model", "ppo", "classify"}
    assert {node.stage for node in config.steps.values()} == set(STAGES) - optional


def weighted(**weights):
    return [{"kind": "text", "name": name, "path": "x", "weight": weight} for name, weight in weights.items()]


def test_weights_of_sources_reach_tokenizer_and_mixture_but_do_not_change_the_corpus():
    config = load("tiny", overrides={"corpus.sources": weighted(web=2, code=1)})
    assert config.section("tokenizer").weights == {"web": 2, "code": 1}
    assert config.section("tokens").streams_by == "source"
    assert config.section("pretrain").mixture.weights == {"web": 2, "code": 1}
    other = load("tiny", overrides={"corpus.sources": weighted(web=5, code=1)})
    assert other.corpus.identity() == config.corpus.identity()


def test_a_mixture_by_label_is_not_overruled_by_the_weights_of_sources():
    overrides = {"corpus.sources": weighted(web=2), "tokens.streams_by": "label", "tokenizer.weights": {"web": 7}}
    config = load("tiny", overrides=overrides)
    assert config.section("tokens").streams_by == "label"
    assert config.section("pretrain").mixture.weights == {}
    assert config.section("tokenizer").weights == {"web": 7}


def test_a_weight_for_some_sources_alone_is_refused():
    with pytest.raises(ConfigError, match=r"no weight for \['code'\]"):
        load("tiny", overrides={"corpus.sources": weighted(web=2, code=None)})


def test_an_override_of_one_key_keeps_the_others_of_its_table():
    overrides = {"sft.mixture.a": 2, "sft.mixture.b": 0.5, "steps.sft.settings": {"num_epochs": 1}}
    config = load("tiny", overrides=overrides)
    assert config.sft.mixture == {"a": 2, "b": 0.5}
    assert config.section("sft").num_epochs == 1
    assert config.steps["sft"].inputs["model"] == "pretrain"


def test_the_model_of_a_disabled_step_is_replaced_by_its_own_input():
    config = load("tiny", overrides={"enable.dpo": False, "enable.preferences": False})
    assert list(config.steps) == [name for name in DEFAULT_STEPS if name not in ("dpo", "preferences")]
    assert config.steps["grpo"].inputs["model"] == "sft"
    assert config.steps["evaluate"].inputs["models"] == ("pretrain", "sft", "grpo")
    assert load("tiny", overrides={"enable.evaluate": False}).steps["register"].inputs == {"model": "grpo"}


def test_a_chain_of_disabled_steps_passes_the_first_model_on():
    config = load("tiny", overrides={"enable": {"sft": False, "dpo": False, "preferences": False}})
    assert config.steps["grpo"].inputs["model"] == "pretrain"
    assert config.steps["evaluate"].inputs["reference"] == "pretrain"


def test_an_unknown_step_cannot_be_enabled():
    with pytest.raises(ConfigError, match=r"enable\.dpoo: there is no such step; known: prompts, "):
        load("tiny", overrides={"enable.dpoo": True})


def test_a_disabled_step_can_be_enabled_by_the_table(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[enable]\ndpo = true\n")
    config = load("tiny", file=file, overrides={"steps.dpo.enabled": False})
    assert config.steps["grpo"].inputs["model"] == "dpo"
