"""Batched decoding against decoding one sequence at a time without a cache."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from lilpipe.config import ModelConfig, SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.engine import Engine, Sample, generate, stream
from lilpipe.generation.pages import PagePool
from lilpipe.generation.rows import Rows
from lilpipe.generation.sampling import choose, uniforms
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer, token_logprobs
from tests.model.checkpoints import SMALL, small_model, small_tokenizer
from tests.model.options import OPTIONS

VOCAB = 40
PROMPTS = [[3], [5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 1], [2, 2]]
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=12, batch_size=4)
STOP = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_seq_len=32
    )
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # far from uniform, so that a wrong cache shows
    return model.eval()


@torch.no_grad()
def naive(
    model: Transformer,
    prompt: Sequence[int],
    *,
    index: int,
    sample: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int] = STOP,
    seed: int = 7,
) -> Sample:
    """One sequence, the whole of it through the model for each token."""
    draws = uniforms(seed, index, sample, sampling.max_new_tokens)
    tokens, logprobs = list(prompt), []
    while len(logprobs) < sampling.max_new_tokens and len(tokens) < model.config.max_seq_len:
        logits = model(torch.tensor([tokens]))[:, -1]
        draw = draws[len(logprobs)][None]
        token = int(choose(logits, draw, temperature=sampling.temperature, top_p=sampling.top_p))
        logprobs.append(float(logits.log_softmax(-1)[0, token]))
        if token in stop_ids:
            return Sample(tokens[len(prompt) :], logprobs, True)
        tokens.append(token)
    return Sample(tokens[len(prompt) :], logprobs, False)


def assert_same(got: Sample, expected: Sample) -> None:
    assert got.tokens == expected.tokens
    assert got.finished == expected.finished
    assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batched_samples_are_those_of_decoding_each_alone_without_a_cache(model, changes, batch_size):
    sampling = SAMPLING.model_copy(update={**changes, "batch_size": batch_size})
    answers = generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=7, num_samples=3)
    assert [len(samples) for samples in answers] == [3] * len(PROMPTS)
    for index, (prompt, samples) in enumerate(zip(PROMPTS, answers, strict=True)):
        for number, sample in enumerate(samples):
            assert_same(sample, naive(model, prompt, index=index, sample=number, sampling=sampling))


def test_some_answers_finish_and_some_do_not(model):
    """Guards the test above: both ways of ending must occur in it, and at different lengths."""
    answers = generate(model, PROMPTS, sampling=SAMPLING, stop_ids=STOP, seed=7, num_samples=3)
    samples = [sample for group in answers for sample in group]
    assert {sample.finished for sample in samples} == {True, False}
    assert len({len(sample.tokens) for sample in samples}) > 4


def test_logprobs_are_those_of_the_full_forward_pass_at_temperature_one(model):
    sampling = SAMPLING.model_copy(update={"temperature": 0.5, "top_p": 0.9})
    for prompt, samples in zip(
        PROMPTS, generate(model, PROMPTS, sampling=sampling, stop_ids=(), seed=1, num_samples=2), strict=True
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


def test_each_prompt_is_read_once_however_many_samples(model, monkeypatch):
    read = []
    together = Engine._read_together

    def spy(self, requests):
        read.extend(request.prompt for request in requests)
        together(self, requests)

    monkeypatch.setattr(Engine, "_read_together", spy)
    sampling = SAMPLING.model_copy(update={"batch_size": 6})
    generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=0, num_samples=4)
    assert sorted(read) == sorted(PROMPTS)


@pytest.mark.parametrize("batch_size", [3, 4, 100])
def test_at_most_batch_size_rows_are_decoded_together(model, monkeypatch, batch_size):
    widths = []
    inputs = Rows.inputs
    monkeypatch.setattr(Rows, "inputs", lambda self: widths.append(len(self)) or inputs(self))
    sampling = SAMPLING.model_copy(update={"batch_size": batch_size})
    generate(model, PROMPTS, sampling=sampling, stop_ids=STOP, seed=0, num_samples=4)
    assert min(batch_size, 20) - 1 <= max(widths) <= min(batch_size, 20)  # one answer ends with its first token
    assert min(widths) < max(widths)  # the batch shrinks at the end


def test_samples_differ_by_seed_prompt_index_and_sample_index(model):
    def tokens(seed: int) -> list[tuple[int, ...]]:
        answers = generate(model, [[3], [3]], sampling=SAMPLING, stop_ids=(), seed=seed, num_samples=2)
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
    broken = Transformer(model.config, VOCAB)
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
    answers = generate(model, prompts, sampling=sampling, stop_ids=range(8), seed=0, num_samples=3)
    assert len({len(sample.tokens) for samples in answers for sample in samples}) > 3
    for prompt, samples in zip(prompts, answers, strict=True):
        for sample in filter(lambda sample: sample.tokens, samples):
            tokens = torch.tensor([[*prompt, *sample.tokens]])
            expected = token_logprobs(model, tokens)[0, len(prompt) - 1 :].tolist()
            assert sample.logprobs[: len(sample.tokens)] == pytest.approx(expected, abs=1e-5)
            scores = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
            expected = scores.logprobs[0, len(prompt) - 1 :].tolist()
            assert sample.logprobs[: len(sample.tokens)] == pytest.approx(expected, abs=1e-5)


# --- pages --------------------------------------------------------------------------------------------------------


def run(engine: Engine) -> int:
    """Steps until all is done."""
    return next(count for count in range(10_000) if not engine.step())


@pytest.mark.parametrize("num_pages", [4, 6, 9, 30])
def test_with_few_pages_answers_wait_and_are_the_same(model, num_pages):
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 25, "batch_size": 100})
    prompts = [*PROMPTS, [5] * 7, [6] * 20]
    prompts = [prompt[: 32 - 25] for prompt in prompts]
    free = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=3, num_samples=3)
    engine = Engine(model, max_rows=100, num_pages=num_pages)
    requests = [
        engine.submit(prompt, sampling=sampling, stop_ids=STOP, seed=3, num_samples=3, index=index)
        for index, prompt in enumerate(prompts)
    ]
    most, most_rows = 0, 0
    while engine.step():
        most = max(most, engine.rows.answers.num_used + engine.rows.prompts.num_used)
        most_rows = max(most_rows, len(engine.rows))
    assert most <= num_pages
    assert most_rows >= min(2, num_pages // 3)
    for request, samples in zip(requests, free, strict=True):
        for sample, expected in zip(request.samples, samples, strict=True):
            assert_same(sample, expected)
    assert engine.rows.answers.num_used == engine.rows.prompts.num_used == 0


def test_a_request_that_pages_can_never_hold_is_refused_with_what_it_needs(model):
    engine = Engine(model, max_rows=4, num_pages=2)
    with pytest.raises(DataError, match="need 3 pages of 16 tokens, and num_pages is 2"):
        engine.submit([3] * 5, sampling=SAMPLING.model_copy(update={"max_new_tokens": 20}), stop_ids=(), seed=0)


def test_samples_of_a_prompt_store_it_once(model):
    engine = Engine(model, max_rows=100)
    engine.submit([3] * 20, sampling=SAMPLING, stop_ids=(), seed=0, num_samples=9)
    engine.step()
    assert engine.rows.prompts.num_used == 2
    assert engine.rows.answers.num_used == 9


def test_a_row_is_refilled_before_the_next_step(model):
    engine = Engine(model, max_rows=3)
    for index in range(8):
        engine.submit([3, 5], sampling=SAMPLING, stop_ids=STOP, seed=0, num_samples=2, index=index)
    widths = []
    inputs = engine.rows.inputs
    engine.rows.inputs = lambda: widths.append((len(engine.rows), len(engine.waiting))) or inputs()
    run(engine)
    assert {rows for rows, waiting in widths if waiting} == {3}


def test_pages_are_moved_together_when_few_are_left(model, monkeypatch):
    moved = []
    compact = PagePool.compact
    monkeypatch.setattr(PagePool, "compact", lambda self: moved.append(compact(self)) or moved[-1])
    sampling = SAMPLING.model_copy(update={"batch_size": 100, "max_new_tokens": 30})
    prompts = [[3], [5], [6], [7], [2, 5]]
    answers = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=1, num_samples=8)
    assert any(moved)
    for index, (prompt, samples) in enumerate(zip(prompts, answers, strict=True)):
        for number, sample in enumerate(samples):
            assert_same(sample, naive(model, prompt, index=index, sample=number, sampling=sampling, seed=1))


def test_cancelling_frees_rows_and_pages_and_leaves_others_as_they_are(model):
    def submit(engine: Engine) -> list:
        return [
            engine.submit([3, 5, index], sampling=SAMPLING, stop_ids=(), seed=0, num_samples=3, index=index)
            for index in range(3)
        ]

    undisturbed = Engine(model, max_rows=4)
    expected = submit(undisturbed)
    run(undisturbed)
    engine = Engine(model, max_rows=4)
    first, second, third = submit(engine)
    engine.step()
    engine.cancel(second)  # one of its samples is under way
    engine.step()
    engine.cancel(first)
    assert first.done
    assert second.done
    assert {sample.stop_reason for sample in (*first.samples, *second.samples)} == {"cancelled"}
    assert not first.samples[0].finished
    assert len(first.samples[0].tokens) == 3
    run(engine)
    for sample, other in zip(third.samples, expected[2].samples, strict=True):
        assert_same(sample, other)
    assert engine.rows.answers.num_used == engine.rows.prompts.num_used == 0
    engine.cancel(third)
    assert {sample.stop_reason for sample in third.samples} == {"length"}


@pytest.mark.parametrize("max_rows", [3, 9])
def test_a_layout_padded_to_few_sizes_gives_the_same_answers(model, max_rows):
    """What a captured step has; its shapes are few, and rows that hold nothing disturb none."""
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 20})
    prompts = [prompt + [3] * 5 for prompt in PROMPTS]
    expected = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=2, num_samples=4)
    engine = Engine(model, max_rows=max_rows)
    engine.rows = Rows(model, padded=True)
    requests = [
        engine.submit(prompt, sampling=sampling, stop_ids=STOP, seed=2, num_samples=4, index=index)
        for index, prompt in enumerate(prompts)
    ]
    shapes, inputs = set(), engine.rows.inputs

    def spy():
        tokens_B1, positions_B1, view = inputs()
        shapes.add(len(tokens_B1))
        assert len(tokens_B1) == len(positions_B1) == len(view.page_B) >= len(engine.rows)
        return tokens_B1, positions_B1, view

    engine.rows.inputs = spy
    run(engine)
    assert shapes <= {1, 2, 4, 8, 16}
    for request, samples in zip(requests, expected, strict=True):
        for sample, other in zip(request.samples, samples, strict=True):
            assert_same(sample, other)


# --- requests of different kinds together -------------------------------------------------------------------------


def test_a_request_is_answered_alike_alone_and_beside_others_of_other_settings(model):
    kinds = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5},
        {"min_p": 0.2, "max_new_tokens": 20},
        {"repetition_penalty": 1.5},
        {"top_p": 0.6, "repetition_penalty": 0.8},
        {},
    ]
    settings = [SAMPLING.model_copy(update=changes) for changes in kinds]
    alone = [
        generate(model, [[3, 5, 9]], sampling=sampling, stop_ids=STOP, seed=number, num_samples=2)[0]
        for number, sampling in enumerate(settings)
    ]
    engine = Engine(model, max_rows=5)
    requests = []
    for number, sampling in enumerate(settings):
        requests.append(engine.submit([3, 5, 9], sampling=sampling, stop_ids=STOP, seed=number, num_samples=2))
        engine.step()
    run(engine)
    for request, samples in zip(requests, alone, strict=True):
        for sample, expected in zip(request.samples, samples, strict=True):
            assert_same(sample, expected)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_greedy_answers_under_the_penalty_are_those_of_transformers(model, penalty, tmp_path):
    from transformers import LlamaForCausalLM

    small, tokenizer = small_model(), small_tokenizer()
    save_model(small, tokenizer, tmp_path)
    peer = LlamaForCausalLM.from_pretrained(tmp_path)
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=penalty, max_new_tokens=30)
    for prompt in ([5, 9, 17], [200, 200, 3, 4, 5]):
        ids = torch.tensor([prompt])
        expected = (
            cast(Any, peer)
            .generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, repetition_penalty=penalty
            )[0, len(prompt) :]
            .tolist()
        )
        stop_ids = {tokenizer.turn_end_id, tokenizer.document_end_id}
        answer = generate(small, [prompt], sampling=sampling, stop_ids=stop_ids, seed=0)[0][0].tokens
        assert answer == [token for token in expected if token not in stop_ids]


def test_a_stop_string_ends_an_answer_wherever_it_falls_among_tokens():
    small, tokenizer = small_model(), small_tokenizer()
    sampling = SamplingConfig(max_new_tokens=40, temperature=1.0)

    def answers(stop):
        chosen = sampling.model_copy(update={"stop": stop})
        prompts = [[5, 9], [7]]
        groups = generate(small, prompts, sampling=chosen, stop_ids=(), seed=0, num_samples=6, tokenizer=tokenizer)
        return [sample for group in groups for sample in group]

    free = answers(())
    text = tokenizer.decode(free[0].tokens)
    place = next(i for i in range(3, len(text) - 3) if text[i : i + 3].isascii())
    stop = (text[place : place + 3], "never there at all")
    for sample, whole in zip(answers(stop), free, strict=True):
        length = len(sample.tokens)
        assert sample.tokens == whole.tokens[:length]
        assert len(sample.logprobs) == length
        found = [stop[0] in tokenizer.decode(whole.tokens[:count]) for count in range(1, 41)]
        assert sample.finished == any(found)
        assert sample.stop_reason == ("stop_string" if any(found) else "length")
        if any(found):
            assert length == found.index(True) + 1
    assert answers(stop)[0].finished


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(DataError, match="no tokenizer"):
        generate(model, PROMPTS, sampling=SAMPLING.model_copy(update={"stop": ("x",)}), stop_ids=(), seed=0)
