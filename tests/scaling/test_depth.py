import math

import pytest

from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.model.flops import num_active_parameters, num_parameters, training_flops_per_token
from lilpipe.recipes import get_recipe, load
from lilpipe.scaling.depth import batch_tokens, learning_rate, parse_count

TINY = get_recipe("tiny")


def pretrain(**overrides):
    return load("tiny", overrides={name.replace("__", "."): value for name, value in overrides.items()}).pretrain


@pytest.mark.parametrize("depth", range(1, 41))
def test_every_depth_makes_a_configuration_that_is_valid(depth):
    section = pretrain(depth=depth)
    assert section.model.num_layers == depth
    assert section.model.hidden_size >= 64 * depth
    assert section.model.head_size in (64, 128)
    assert 2 <= section.model.intermediate_size / section.model.hidden_size <= 3


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_heads_divide_among_the_processes_of_tensor_parallelism_at_every_depth(tensor):
    for depth in range(1, 41):
        section = pretrain(depth=depth, pretrain__parallel__tensor=tensor, pretrain__num_workers=tensor)
        assert section.model.num_heads % tensor == 0
        assert section.model.num_kv_heads % tensor == 0
        assert section.model.intermediate_size % tensor == 0


def test_shapes_are_those_that_the_rules_give_by_hand():
    small, large = pretrain(depth=12).model, pretrain(depth=32).model
    assert (small.hidden_size, small.num_heads, small.num_kv_heads, small.intermediate_size) == (768, 12, 3, 2048)
    assert (large.hidden_size, large.num_heads, large.num_kv_heads, large.intermediate_size) == (2048, 16, 4, 5504)


def test_tokens_are_twenty_a_parameter():
    section = pretrain(depth=6)
    tokens = section.num_steps * section.batch_size * section.model.max_seq_len
    assert tokens / num_parameters(section.model, TINY.tokenizer.vocab_size) == pytest.approx(20, rel=0.01)


def test_only_the_parameters_that_are_active_for_a_token_ask_for_tokens():
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    section = pretrain(depth=6, pretrain__model__moe=experts)
    tokens = section.num_steps * section.batch_size * section.model.max_seq_len
    assert tokens / num_active_parameters(section.model, 1024) == pytest.approx(20, rel=0.01)
    assert num_active_parameters(section.model, 1024) < num_parameters(section.model, 1024)


def test_batch_and_learning_rate_are_deepseeks_at_its_own_sizes():
    # DeepSeek LLM (Bi et al. 2024), table 2: 2,304 and 4,608 sequences of 4,096 tokens, 4.2e-4 and 3.2e-4, at the
    # FLOPs of 7 B and 67 B parameters over 2 T tokens. The law gave them before rounding.
    small, large = 6 * 6.9e9 * 2e12, 6 * 67e9 * 2e12
    assert batch_tokens(small) == pytest.approx(2304 * 4096, rel=0.25)
    assert batch_tokens(large) == pytest.approx(4608 * 4096, rel=0.25)
    assert learning_rate(small) == pytest.approx(4.2e-4, rel=0.25)
    assert learning_rate(large) == pytest.approx(3.2e-4, rel=0.25)


def test_batch_and_learning_rate_follow_from_the_runs_compute():
    section = pretrain(depth=8)
    tokens = 20 * num_parameters(section.model, 1024)
    compute = tokens * training_flops_per_token(section.model, 1024)
    assert section.batch_size * 128 == pytest.approx(batch_tokens(compute), rel=0.02)
    assert section.optimizer.learning_rate == pytest.approx(learning_rate(compute), rel=0.01)
    assert section.optimizer.warmup_steps == math.ceil(section.num_steps / 20)
    assert section.optimizer.muon_learning_rate == TINY.pretrain.optimizer.muon_learning_rate


def test_a_batch_divides_among_workers_and_micro_batches():
    section = pretrain(depth=3, pretrain__num_workers=4, pretrain__accumulation_steps=3)
    assert section.batch_size % 12 == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pretrain.model.num_layers", 5),
        ("pretrain.model.hidden_size", 120),
        ("pretrain.model.num_heads", 5),
        ("pretrain.model.num_kv_heads", 3),
        ("pretrain.model.intermediate_size", 99),
        ("pretrain.batch_size", 6),
        ("pretrain.num_steps", 77),
        ("pretrain.optimizer.learning_rate", 0.5),
        ("pretrain.optimizer.warmup_steps", 3),
    ],
)
def test_a_setting_of_the_users_own_wins_and_the_rest_fits_it(setting, value):
    loaded = load("tiny", overrides={"depth": 4, setting: value})
    found = loaded
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == value
    assert loaded.depth == 4


def test_a_files_settings_win_over_the_dial_as_overrides_do(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("depth = 3\n[pretrain]\nbatch_size = 8\n[pretrain.model]\nmax_seq_len = 64\n")
    section = load("tiny", file=file).pretrain
    assert (section.batch_size, section.model.max_seq_len, section.model.num_layers) == (8, 64, 3)
    tokens = section.num_steps * 8 * 64
    assert tokens / num_parameters(section.model, 1024) == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize(("params", "depth"), [("124M", 14), ("1.3B", 31), (3_082_496, 4), (1, 1)])
def test_a_number_of_parameters_is_the_nearest_depth(params, depth):
    loaded = load("tiny", overrides={"params": params})
    assert loaded.pretrain == load("tiny", overrides={"depth": depth}).pretrain
    assert loaded.params == params


def test_gpt2_has_a_head_of_keys_for_each_of_queries_and_four_times_the_width():
    model = pretrain(depth=12, pretrain__model__architecture="gpt2").model
    assert (model.hidden_size, model.num_heads, model.num_kv_heads, model.intermediate_size) == (768, 12, 12, 3072)


def test_without_a_dial_nothing_changes_and_other_stages_never_do():
    assert load("tiny") == TINY
    turned = load("tiny", overrides={"depth": 9})
    for name in set(PipelineConfig.model_fields) - {"depth", "pretrain"}:
        assert getattr(turned, name) == getattr(TINY, name)


@pytest.mark.parametrize(
    ("text", "count"), [("350M", 350_000_000), ("1.3b", 1_300_000_000), ("7_000", 7000), (12, 12), ("2K", 2000)]
)
def test_numbers_of_parameters_are_read_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3, "params": "1M"}, "depth and params: got 3 and 1M, expected only one"),
        ({"depth": 0}, "depth: got 0, expected a whole number above 0"),
        ({"depth": "deep"}, "depth: got 'deep'"),
        ({"params": "many"}, "params: got 'many', expected a number of parameters"),
        ({"params": 0}, "params: got 0"),
        ({"depth": 3, "pretrain.model.hidden_size": "wide"}, "pretrain.model.hidden_size: got 'wide'"),
        ({"depth": 3, "pretrain.num_workers": 3, "pretrain.parallel.tensor": 2}, "num_workers 3 must be a multiple"),
        ({"depth": 3, "pretrain.model.norm_eps": -1}, "pretrain.model: norm_eps: "),
    ],
)
def test_what_cannot_be_derived_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as error:
        load("tiny", overrides=overrides)
    assert message in str(error.value)
