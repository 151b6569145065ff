import pytest

from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.phases import PhaseConfig
from lilpipe.config.training import BudgetConfig, PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.flops import training_flops_per_token
from lilpipe.training.budget import budget, planned_beside_actual

LLAMA_8B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=14_336,
    max_seq_len=8192,
    tie_embeddings=False,
)
VOCAB = 128_256
H100 = BudgetConfig(device="h100", mfu=0.4, price_per_hour=2.5)


def config_of_8b(**changes):
    settings = {
        "model": LLAMA_8B,
        "num_steps": 1_000,
        "batch_size": 64,
        "num_workers": 64,
        "parallel": ParallelConfig(shard=64),
        "precision": "bf16",
        "budget": H100,
    }
    return PretrainConfig(**(settings | changes))


def test_llama_3_8b_has_the_parameters_that_its_report_says():
    assert budget(config_of_8b(), VOCAB).num_parameters == 8_030_261_248


def test_time_and_cost_follow_from_operations_peak_and_utilisation():
    plan = budget(config_of_8b(), VOCAB)
    assert plan.tokens == 1_000 * 64 * 8192
    assert plan.flops == plan.tokens * training_flops_per_token(LLAMA_8B, VOCAB)
    assert plan.seconds == pytest.approx(plan.flops / (64 * 989.4e12 * 0.4))
    assert plan.cost == pytest.approx(64 * plan.seconds / 3600 * 2.5)
    assert plan.tokens_per_second == pytest.approx(plan.tokens / plan.seconds)


def test_each_phase_counts_with_its_own_batch_and_length():
    config = config_of_8b(phases=(PhaseConfig(from_step=600, batch_size=128, seq_len=4096),))
    plan = budget(config, VOCAB)
    first, second = 600 * 64 * 8192, 400 * 128 * 4096
    assert plan.tokens == first + second
    expected = first * training_flops_per_token(LLAMA_8B, VOCAB, seq_len=8192)
    expected += second * training_flops_per_token(LLAMA_8B, VOCAB, seq_len=4096)
    assert plan.flops == expected


def test_computing_again_costs_operations_that_do_not_count_as_the_models():
    plain, again = (budget(config_of_8b(activation_checkpointing=mode), VOCAB) for mode in ("none", "full"))
    assert again.flops == plain.flops == plain.executed_flops
    assert 1.3 < again.executed_flops / again.flops < 1.34


def test_a_plan_that_fits_has_no_warning_and_one_that_does_not_names_what_to_change():
    assert budget(config_of_8b(), VOCAB).warnings == []
    (warning,) = budget(config_of_8b(parallel=ParallelConfig(), budget=H100), VOCAB).warnings
    assert "exceeds the 76.00 GiB that h100 has" in warning
    assert warning.split(": ")[1].startswith("increase parallel.shard from 1")
    wide = config_of_8b(batch_size=256, budget=H100)
    (warning,) = budget(wide, VOCAB).warnings
    assert warning.split("5%): ")[1].startswith("set activation_checkpointing to 'selective' or 'full'")
    assert "increase accumulation_steps: a micro-batch has 4 rows" in warning


def test_the_terms_of_memory_are_shown_and_add_up():
    plan = budget(config_of_8b(), VOCAB)
    names = [name for name, _, _ in plan.lines()]
    assert names[:6] == ["parameters", "tokens", "steps", "FLOPs", "time", "tokens/s"]
    assert {"weights", "gradients", "optimizer state", "activations", "logits"} < set(names)
    assert plan.peak_memory_bytes == pytest.approx(sum(term.bytes for term in plan.memory))


def test_a_cpu_is_planned_with_what_it_reaches_here():
    config = PretrainConfig(num_workers=2, budget=BudgetConfig(device="cpu"))
    plan = budget(config, 512)
    assert plan.device.name == "cpu"
    assert plan.seconds > 0


def test_planned_stands_beside_what_was_measured():
    plan = budget(config_of_8b(), VOCAB)
    rows = planned_beside_actual(plan, {"tokens": plan.tokens, "seconds": 2 * plan.seconds, "loss": 2.0})
    assert [(row[""], row["actual / planned"]) for row in rows] == [("tokens", 1.0), ("time in steps, s", 2.0)]


def test_a_utilisation_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="mfu: got 0, expected a ratio above 0"):
        budget(config_of_8b(budget=BudgetConfig(device="h100", mfu=0)), VOCAB)
