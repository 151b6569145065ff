"""Batched decoding against decoding one sequence at a time without a cache."""

from typing import Any, cast

import pytest
import torch

from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.engine import Engine, generate, stream
from lilpipe.generation.fused import FusedDecoder
from lilpipe.generation.rows import Rows
from lilpipe.model.transformer import Transformer, token_logprobs
from tests.generation.alone import PROMPTS, SAMPLING, STOP, assert_same, naive, sharp_model
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import OPTIONS
from tests.model.test_lora import KINDS, merged
from tests.model.test_lora import adapted as with_effect


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batched_samples_are_those_of_decoding_each_alone_without_a_cache(model, changes, batch_size):
    sampling = SAMPLING.model_copy(update={**changes, "batch_size": batch_size})
    answers = generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=7, num_generations=3)
    assert [len(samples) for samples in answers] == [3] * len(PROMPTS)
    for index, (prompt, samples) in enumerate(zip(PROMPTS, answers, strict=True)):
        for number, sample in enumerate(samples):
            assert_same(sample, naive(model, prompt, index=index, sample=number, sampling=sampling))


def test_some_answers_finish_and_some_do_not(model):
    """Guards the test above: both ways of ending must occur in it, and at different lengths."""
    answers = generate(model, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=7, num_generations=3)
    samples = [sample for group in answers for sample in group]
    assert {sample.finished for sample in samples} == {True, False}
    assert len({len(sample.tokens) for sample in samples}) > 4


def test_logprobs_are_those_of_the_full_forward_pass_at_temperature_one(model):
    sampling = SAMPLING.model_copy(update={"temperature": 0.5, "top_p": 0.9})
    for prompt, samples in zip(
        PROMPTS, generate(model, PROMPTS, sampling=sampling, stop_ids=(), seed=1, num_generations=2), strict=True
    ):
        for sample in samples:
            whole = token_logprobs(model, torch.tensor([[*prompt, *sample.tokens]]))[0, len(prompt) - 1 :]
            assert sample.logprobs == pytest.approx(whole.tolist(), abs=1e-5)


def test_a_stop_token_ends_the_answer_and_only_its_logprob_is_kept(model):
    sampling = SAMPLING.model_copy(update={"temperature": 0})
    free = generate(model, PROMPTS[1:2], sampling=sampling, stop_ids=(), seed=0)[0][0]
    assert not free.finished
    assert len(free.tokens) == len(free.logprobs) == 12
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    stopped = generate(model, PROMPTS[1:2], sampling=sampling, stop_ids=[stop], seed=0)[0][0]
    assert stopped.finished
    assert stopped.tokens == free.tokens[:first]
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1])


@pytest.mark.parametrize("options", ["plain", "untied", "qk_norm"])
def test_the_matrices_of_a_frozen_model_are_moved_and_keep_their_values(options):
    config = SMALL.model_copy(update=OPTIONS[options])
    model, frozen = small_model(config), small_model(config).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    expected = generate(model, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=7)
    found = generate(frozen, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=7)
    for (sample,), (wanted,) in zip(found, expected, strict=True):
        assert_same(sample, wanted)
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[name])
    mlp = cast("Any", frozen.model.layers["0"]).mlp
    first, second = (FusedDecoder(frozen).weights[0] for _ in range(2))
    assert mlp.gate_proj.weight.data_ptr() == first.gate_up.data_ptr() == second.gate_up.data_ptr()
    assert {tensor.untyped_storage().data_ptr() for tensor in (first.qkv, second.qkv)} == {first.qkv.data_ptr()}
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(2)
    assert torch.equal(
        first.gate_up[:, : len(mlp.gate_proj.weight)].t(), 2 * before["model.layers.0.mlp.gate_proj.weight"]
    )
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values()), "a model that may train stays"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_model_with_adapters_is_sampled_with_them(monkeypatch, kind, fused):
    adapted = with_effect(KINDS[kind])
    plain, _ = merged(adapted)
    if not fused:
        monkeypatch.setattr("lilpipe.generation.engine.is_fusable", lambda model: False)
    assert (Engine(adapted, max_rows=1).fused is not None) == fused
    found, expected, base = (
        generate(model, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=7) for model in (adapted, plain, small_model())
    )
    for (sample,), (wanted,) in zip(found, expected, strict=True):
        assert sample.tokens == wanted.tokens
        assert sample.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert [group[0].tokens for group in found] != [group[0].tokens for group in base]


def test_each_prompt_is_read_once_however_many_samples(model, monkeypatch):
    read = []
    together = Engine._read_together

    def spy(self, requests):
        read.extend(request.prompt for request in requests)
        together(self, requests)

    monkeypatch.setattr(Engine, "_read_together", spy)
    sampling = SAMPLING.model_copy(update={"batch_size": 6})
    generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=0, num_generations=4)
    assert sorted(read) == sorted(PROMPTS)


@pytest.mark.parametrize("batch_size", [3, 4, 100])
def test_at_most_batch_size_rows_are_decoded_together(model, monkeypatch, batch_size):
    widths = []
    inputs = Rows.inputs
    monkeypatch.setattr(Rows, "inputs", lambda self: widths.append(len(self)) or inputs(self))
    sampling = SAMPLING.model_copy(update={"batch_size": batch_size})
    generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=0, num_generations=4)
    assert min(batch_size, 20) - 1 <= max(widths) <= min(batch_size, 20)  # one answer ends with its first token
    assert min(widths) < max(widths)  # the batch shrinks at the end


def test_samples_differ_by_seed_prompt_index_and_sample_index(model):
    def tokens(seed: int) -> list[tuple[int, ...]]:
        answers = generate(model, [[3], [3]], sampling=SAMPLING, stop_ids=(), seed=seed, num_generations=2)
        return [tuple(sample.tokens) for samples in answers for sample in samples]

    assert len({*tokens(0), *tokens(1)}) == 8
    assert tokens(0) == tokens(0)


def test_the_global_random_generator_is_neither_read_nor_advanced(model):
    def run() -> object:
        return generate(model, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=0)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert run() == first


def test_an_answer_that_reaches_max_seq_len_ends_unfinished(model):
    prompt = [3] * 28
    sample = generate(model, [prompt], sampling=SAMPLING, stop_ids=(), seed=0)[0][0]
    assert len(sample.tokens) == len(sample.logprobs) == 32 - 28
    assert not sample.finished


@pytest.mark.parametrize("length", [0, 32, 50])
def test_a_prompt_without_room_for_an_answer_is_refused_by_index(model, length):
    with pytest.raises(DataError, match=rf"prompt 1: got {length} tokens, expected 1 to 31"):
        generate(model, [[3], [3] * length], sampling=SAMPLING, stop_ids=(), seed=0)


def test_no_prompts_give_no_answers(model):
    assert generate(model, [], sampling=SAMPLING, stop_ids=(), seed=0) == []


def test_a_diverged_model_is_refused(model):
    broken = Transformer(model.config, model.vocab_size)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        generate(broken, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=0)


@pytest.mark.parametrize("stop_ids", [(), STOP])
def test_streamed_tokens_are_those_of_generate(model, stop_ids):
    for prompt in PROMPTS:
        tokens = list(stream(model, prompt, sampling=SAMPLING, stop_ids=stop_ids, seed=5))
        assert tokens == generate(model, [prompt], sampling=SAMPLING, stop_ids=stop_ids, seed=5)[0][0].tokens


# --- agreement with the trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_logprobs_are_the_trainers_for_every_kind_of_decoder(option):
    config = SMALL.model_copy(update={"max_seq_len": 96, **OPTIONS[option]})
    model = small_model(config, vocab_size=70, scale=4.0)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 70, (length,), generator=generator).tolist() for length in (1, 15, 16, 17, 40)]
    sampling = SamplingConfig(temperature=0.8, top_k=20, max_new_tokens=36, batch_size=7)
    answers = generate(model, prompts, sampling=sampling, stop_ids=range(8), seed=0, num_generations=3)
    assert len({len(sample.tokens) for samples in answers for sample in samples}) > 3
    for prompt, samples in zip(prompts, answers, strict=True):
        for sample in filter(lambda sample: sample.tokens, samples):
            tokens = torch.tensor([[*prompt, *sample.tokens]])
            expected = token_logprobs(model, tokens)[0, len(prompt) - 1 :].tolist()
            assert sample.logprobs[: len(sample.tokens)] == pytest.approx(expected, abs=1e-5)
            scores = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
            expected = scores.logprobs[0, len(prompt) - 1 :].tolist()
            assert sample.logprobs[: len(sample.tokens)] == pytest.approx(expected, abs=1e-5)
