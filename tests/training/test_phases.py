"""Phases of pretraining in the configuration: what each takes from it, and what is refused."""

import pytest

from lilpipe.config.model import ModelConfig
from lilpipe.config.phases import MixtureConfig, Phase
from lilpipe.config.training import OptimizerConfig, PretrainConfig

LLAMA = ModelConfig(max_seq_len=1024, rope_theta=10_000)
GPT2 = ModelConfig(architecture="gpt2", num_heads=4, num_kv_heads=4)
ANNEALING = MixtureConfig(weights={"best": 1.0})


def config(*phases, **settings):
    values = {"num_steps": 100, "batch_size": 16, "seq_len": 256, "model": LLAMA, "phases": phases, **settings}
    return PretrainConfig.model_validate(values)


def test_a_run_without_phases_is_one():
    assert config().resolved_phases == (Phase(0, 0, 100, 16, 1, 256, 10_000, 0.5, MixtureConfig()),)
    assert config(seq_len=None).resolved_phases[0].seq_len == 1024


def test_a_phase_has_what_it_names_and_the_rest_from_pretraining_whatever_the_phase_before_had():
    run = config(
        {"from_step": 30, "batch_size": 32, "accumulation_steps": 2},
        {"from_step": 60, "seq_len": 512, "rope_theta": 5e5, "batch_size": 8},
        {"from_step": 90, "mixture": ANNEALING, "exercise_ratio": 0.0},
    )
    assert run.resolved_phases == (
        Phase(0, 0, 30, 16, 1, 256, 10_000, 0.5, MixtureConfig()),
        Phase(1, 30, 60, 32, 2, 256, 10_000, 0.5, MixtureConfig()),
        Phase(2, 60, 90, 8, 1, 512, 5e5, 0.5, MixtureConfig()),
        Phase(3, 90, 100, 16, 1, 256, 10_000, 0.0, ANNEALING),
    )
    assert [run.phase_of(step).number for step in (0, 29, 30, 59, 60, 89, 90, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("phases", "settings", "message"),
    [
        (({"from_step": 100},), {}, r"phases\.0\.from_step 100 must be 1 to 99: .*below num_steps 100"),
        (({"from_step": 9}, {"from_step": 9}), {}, r"phases\.1\.from_step 9 must be 10 to 99: after the phase before"),
        (({"from_step": 9}, {"from_step": 20, "batch_size": 18}), {"num_workers": 4}, r"phases\.1\.batch_size 18 must"),
        (
            ({"from_step": 9, "accumulation_steps": 3},),
            {},
            r"phases\.0\.batch_size 16 .*accumulation_steps = 1 x 1 x 3",
        ),
        (({"from_step": 9, "seq_len": 2048},), {}, r"phases\.0\.seq_len 2048 must be at most model\.max_seq_len 1024"),
        ((), {"seq_len": 2048}, r"seq_len 2048 must be at most model\.max_seq_len 1024"),
        (({"from_step": 9, "seq_len": 64},), {"stride": 128}, r"stride 128 must be at most phases\.0\.seq_len 64"),
        (({"from_step": 9, "rope_theta": 5e5},), {"model": GPT2}, r"phases\.0\.rope_theta would be ignored: gpt2"),
    ],
)
def test_phases_that_cannot_be_are_refused_by_the_name_of_the_setting(phases, settings, message):
    with pytest.raises(ValueError, match=message):
        config(*phases, **settings)


def test_warmup_and_decay_that_overlap_are_refused():
    with pytest.raises(ValueError, match=r"warmup_steps 81 \+ decay_ratio 0\.2 x num_steps 100 must be at most 100"):
        config(optimizer=OptimizerConfig(schedule="wsd", warmup_steps=81, decay_ratio=0.2))
    config(optimizer=OptimizerConfig(schedule="wsd", warmup_steps=80, decay_ratio=0.2))
    config(optimizer=OptimizerConfig(schedule="cosine", warmup_steps=81, decay_ratio=0.2))
