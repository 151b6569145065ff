"""Which layouts there are, and why the others are refused before any process starts."""

import pytest
from pydantic import ValidationError

from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.parallel_checks import check_vocabulary
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.training import PretrainConfig

MODEL = {"hidden_size": 96, "num_layers": 4, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 64}


def config(num_workers, *, model=None, batch_size=8, accumulation_steps=1, seq_len=48, **parallel):
    return PretrainConfig.model_validate(
        {
            "num_workers": num_workers,
            "batch_size": batch_size,
            "accumulation_steps": accumulation_steps,
            "seq_len": seq_len,
            "model": MODEL | (model or {}),
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: config(6, shard=4), "num_workers 6 must be a multiple of .*shard 4 x context 1 x tensor 1 = 4"),
        (lambda: config(6, shard=3), "batch_size 8 .* replicate x shard x accumulation_steps = 2 x 3 x 1 = 6"),
        (lambda: config(4, tensor=4), "parallel.tensor 4 must divide model.num_heads 6"),
        (lambda: config(2, tensor=2), "parallel.tensor 2 must divide model.num_kv_heads 3"),
        (lambda: config(3, tensor=3), "parallel.tensor 3 must divide model.intermediate_size 64"),
        (
            lambda: config(2, context=2, seq_len=50),
            r"seq_len 50 must be a multiple of 4: .* 2 x parallel.context 2 chunks",
        ),
        (
            lambda: config(12, context=4, tensor=3, seq_len=40, model={"intermediate_size": 66}),
            r"seq_len 40 must be a multiple of 24: .* over parallel.tensor 3",
        ),
        (
            lambda: config(2, pipeline=2, stages_per_worker=4, schedule="interleaved", accumulation_steps=2),
            r"num_layers 4 must be at least parallel.pipeline x stages_per_worker = 2 x 4 = 8 stages",
        ),
        (lambda: config(1, schedule="zero_bubble"), "schedule zero_bubble .* would be ignored by pipeline 1"),
        (lambda: config(2, pipeline=2, stages_per_worker=2, accumulation_steps=2), "must be 1 for schedule 1f1b"),
        (lambda: config(2, pipeline=2, schedule="interleaved", accumulation_steps=2), "must be 2 or more for schedule"),
        (
            lambda: config(4, pipeline=4, accumulation_steps=2),
            "accumulation_steps 2 must be at least parallel.pipeline 4",
        ),
        (
            lambda: config(
                2, pipeline=2, stages_per_worker=2, schedule="interleaved", accumulation_steps=3, batch_size=6
            ),
            "accumulation_steps 3 must be a multiple of parallel.pipeline 2",
        ),
    ],
)
def test_an_impossible_layout_is_refused_with_the_arithmetic(problem, message):
    with pytest.raises(ValidationError, match=message):
        problem()


def test_the_zero_bubble_schedule_takes_no_selective_recomputation():
    layout = {"pipeline": 2, "stages_per_worker": 2, "schedule": "zero_bubble"}
    section = {"num_workers": 2, "accumulation_steps": 2, "parallel": layout, "model": MODEL}
    PretrainConfig.model_validate(section | {"activation_checkpointing": "full"})
    with pytest.raises(
        ValidationError, match=r"activation_checkpointing selective is not supported with parallel.schedule"
    ):
        PretrainConfig.model_validate(section | {"activation_checkpointing": "selective"})


def test_a_layout_must_suit_every_phase():
    phases = [{"from_step": 500, "seq_len": 18}]
    with pytest.raises(ValidationError, match=r"phases.0.seq_len 18 must be a multiple of 4: "):
        PretrainConfig.model_validate({"num_workers": 2, "seq_len": 16, "phases": phases, "parallel": {"context": 2}})


def test_latent_attention_has_no_key_heads_to_divide():
    assert config(2, tensor=2, model={"mla": {}}).layout.tensor == 2


def test_a_vocabulary_that_tensor_parallelism_cannot_divide_is_refused_with_the_nearest_that_it_can():
    layout = config(3, tensor=3, model={"intermediate_size": 66}).layout
    check_vocabulary(layout, 300)
    with pytest.raises(ValueError, match=r"tensor 3 must divide the vocabulary size 301, remainder 1; .* 300 or 303"):
        check_vocabulary(layout, 301)
    pretrain = {"num_workers": 2, "parallel": {"tensor": 2}}
    with pytest.raises(ValidationError, match="must divide the vocabulary size 4095"):
        PipelineConfig.model_validate({"recipe": "toy", "tokenizer": {"vocab_size": 4095}, "pretrain": pretrain})


def test_all_dimensions_multiply_to_the_number_of_workers():
    parallel = ParallelConfig(pipeline=2, shard=2, context=2, tensor=2)
    assert parallel.layout(48) == (2, 3, 2, 2, 2)
    assert parallel.layout(48).data == 6


@pytest.mark.parametrize(
    ("context", "tensor", "multiple"), [(1, 1, 1), (1, 4, 4), (2, 1, 4), (2, 2, 4), (2, 4, 8), (4, 3, 24)]
)
def test_a_sequence_is_cut_into_chunks_and_these_over_tensor_parallelism(context, tensor, multiple):
    parallel = ParallelConfig(context=context, tensor=tensor)
    assert parallel.layout(context * tensor).seq_len_multiple == multiple
