"""Sampling from a class of transformers: as one sequence at a time without a cache, with the same random numbers."""

import pytest
import torch

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import engine_for, generate, stream
from lilpipe.model.hub import load_model
from tests.generation.alone import PROMPTS, SAMPLING, STOP, assert_same, naive
from tests.model.published import PUBLISHED, publish


@pytest.fixture(scope="module", params=PUBLISHED)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    publish(request.param, directory, max_position_embeddings=32)
    return load_model(directory)[0]


@pytest.mark.parametrize("sampling", [SAMPLING, SAMPLING.model_copy(update={"temperature": 0.7, "top_p": 0.8})])
def test_each_completion_is_that_of_one_sequence_alone(model, sampling):
    prompts = [*PROMPTS, PROMPTS[1][:2]]
    groups = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=7, num_generations=3)
    for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for sample, got in enumerate(group):
            assert_same(got, naive(model, prompt, index=index, sample=sample, sampling=sampling), atol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "cohere", "phi"])
def test_greedy_completions_with_a_penalty_are_those_of_transformers(kind, tmp_path):
    theirs = publish(kind, tmp_path)
    settings = {"do_sample": False, "repetition_penalty": 1.4, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, **settings)[0, 3:].tolist()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12, repetition_penalty=1.4)
    (answer,) = generate(load_model(tmp_path)[0], [[5, 6, 7]], sampling=sampling, stop_ids=(), seed=0)[0]
    assert answer.tokens == expected


def test_a_stream_has_the_tokens_of_generate(model):
    expected = generate(model, [[5, 6, 7]], sampling=SAMPLING, stop_ids=STOP, seed=7)[0][0].tokens
    assert list(stream(model, [5, 6, 7], sampling=SAMPLING, stop_ids=STOP, seed=7)) == expected


def test_requests_have_top_logprobs_and_can_be_cancelled(model):
    engine = engine_for(model, max_rows=1)
    asked = engine.submit([5, 6, 7], sampling=SAMPLING, stop_ids=(), seed=0, num_top_logprobs=2)
    dropped = engine.submit([5, 6, 7], sampling=SAMPLING, stop_ids=(), seed=1)
    engine.cancel(dropped)
    while engine.step():
        pass
    assert asked.done
    assert dropped.done
    assert dropped.samples[0].tokens == []
    assert dropped.samples[0].stop_reason == "cancelled"
    with torch.no_grad():
        first = model(torch.tensor([[5, 6, 7]]))[0, -1].log_softmax(-1).topk(2)
    (token, logprob), (other, _) = asked.samples[0].top_logprobs[0]
    assert [token, other] == first.indices.tolist()
    assert logprob == pytest.approx(first.values[0].item(), abs=1e-5)
