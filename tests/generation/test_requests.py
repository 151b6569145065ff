"""Requests that share an engine: pages and rows they wait for, move in and give back, each with its own settings."""

from typing import Any, cast

import pytest
import torch

from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.engine import Engine, generate
from lilpipe.generation.pages import PagePool
from lilpipe.generation.rows import Rows
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from tests.generation.alone import PROMPTS, SAMPLING, STOP, assert_same, naive, sharp_model
from tests.model.checkpoints import small_model, small_tokenizer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


# --- pages --------------------------------------------------------------------------------------------------------


def run(engine: Engine) -> int:
    """Steps until all is done."""
    return next(count for count in range(10_000) if not engine.step())


@pytest.mark.parametrize("num_pages", [4, 6, 9, 30])
def test_with_few_pages_answers_wait_and_are_the_same(model, num_pages):
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 25, "batch_size": 100})
    prompts = [*PROMPTS, [5] * 7, [6] * 20]
    prompts = [prompt[: 32 - 25] for prompt in prompts]
    free = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=3, num_generations=3)
    engine = Engine(model, max_rows=100, num_pages=num_pages)
    requests = [
        engine.submit(prompt, sampling=sampling, stop_ids=STOP, seed=3, num_generations=3, index=index)
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
    with pytest.raises(DataError, match="need 3 pages of 16 tokens, but num_pages is 2"):
        engine.submit([3] * 5, sampling=SAMPLING.model_copy(update={"max_new_tokens": 20}), stop_ids=(), seed=0)


def test_samples_of_a_prompt_store_it_once(model):
    engine = Engine(model, max_rows=100)
    engine.submit([3] * 20, sampling=SAMPLING, stop_ids=(), seed=0, num_generations=9)
    engine.step()
    assert engine.rows.prompts.num_used == 2
    assert engine.rows.answers.num_used == 9


def test_a_row_is_refilled_before_the_next_step(model):
    engine = Engine(model, max_rows=3)
    for index in range(8):
        engine.submit([3, 5], sampling=SAMPLING, stop_ids=STOP, seed=0, num_generations=2, index=index)
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
    answers = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=1, num_generations=8)
    assert any(moved)
    for index, (prompt, samples) in enumerate(zip(prompts, answers, strict=True)):
        for number, sample in enumerate(samples):
            assert_same(sample, naive(model, prompt, index=index, sample=number, sampling=sampling, seed=1))


def test_cancelling_frees_rows_and_pages_and_leaves_others_as_they_are(model):
    def submit(engine: Engine) -> list:
        return [
            engine.submit([3, 5, index], sampling=SAMPLING, stop_ids=(), seed=0, num_generations=3, index=index)
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
    expected = generate(model, prompts, sampling=sampling, stop_ids=STOP, seed=2, num_generations=4)
    engine = Engine(model, max_rows=max_rows)
    engine.rows = Rows(model, padded=True)
    requests = [
        engine.submit(prompt, sampling=sampling, stop_ids=STOP, seed=2, num_generations=4, index=index)
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
        generate(model, [[3, 5, 9]], sampling=sampling, stop_ids=STOP, seed=number, num_generations=2)[0]
        for number, sampling in enumerate(settings)
    ]
    engine = Engine(model, max_rows=5)
    requests = []
    for number, sampling in enumerate(settings):
        requests.append(engine.submit([3, 5, 9], sampling=sampling, stop_ids=STOP, seed=number, num_generations=2))
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
        groups = generate(small, prompts, sampling=chosen, stop_ids=(), seed=0, num_generations=6, tokenizer=tokenizer)
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
    with pytest.raises(DataError, match="without a tokenizer"):
        generate(model, PROMPTS, sampling=SAMPLING.model_copy(update={"stop": ("x",)}), stop_ids=(), seed=0)
