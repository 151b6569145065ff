"""The likeliest tokens beside those drawn: OpenAI's `top_logprobs`."""

import pytest
import torch

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import Engine, generate
from lilpipe.generation.pyfunc import ServedModel
from lilpipe.model.hub import save_model
from tests.model.checkpoints import SMALL, small_model, small_tokenizer

PROMPT = [5, 6, 7]
SAMPLING = SamplingConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(SMALL), small_tokenizer(), directory)
    return ServedModel(directory)


def likeliest(model, tokens, count):
    """At each place behind the prompt, from one pass over the whole."""
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *tokens]]))[0, len(PROMPT) - 1 : -1]
    values, ids = logits.log_softmax(-1).topk(count)
    return ids.tolist(), values.tolist()


def test_the_likeliest_tokens_are_noted_for_who_asks_and_change_no_answer(answers):
    model = answers.model
    engine = Engine(model, max_rows=3)
    requests = [
        engine.submit(PROMPT, sampling=SAMPLING, stop_ids=(), seed=7, index=index, num_top_logprobs=count)
        for index, count in enumerate((5, 0, 1, 10**6))
    ]
    while engine.step():
        pass
    plain = generate(model, [PROMPT] * 4, sampling=SAMPLING, stop_ids=(), seed=7)
    for request, count, [alone] in zip(requests, (5, 0, 1, model.vocab_size), plain, strict=True):
        (sample,) = request.samples
        assert sample.tokens == alone.tokens
        if count == 0:
            assert sample.top_logprobs == []
            continue
        ids, values = likeliest(model, sample.tokens, count)
        for place, expected_ids, expected in zip(sample.top_logprobs, ids, values, strict=True):
            assert [token for token, _ in place] == expected_ids
            assert [value for _, value in place] == pytest.approx(expected, abs=1e-5)


def test_a_chat_shows_as_many_as_it_asks_for_with_the_bytes_of_each(answers):
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 1.5, "seed": 1}
    (choice,) = answers.predict({**asked, "logprobs": True, "top_logprobs": 3})["choices"]
    (plain,) = answers.predict({**asked, "logprobs": True})["choices"]
    content = choice["logprobs"]["content"]
    assert [{**entry, "top_logprobs": []} for entry in content] == plain["logprobs"]["content"]
    ids = {bytes(data): token for token, data in enumerate(answers.vocabulary)}
    request_ids = answers.tokenizer.user_id, *answers.tokenizer.encode("hi"), answers.tokenizer.turn_end_id
    context = [*request_ids, answers.tokenizer.assistant_id]
    for entry in content:
        with torch.no_grad():
            values, tokens = answers.model(torch.tensor([context]))[0, -1].log_softmax(-1).topk(3)
        shown = entry["top_logprobs"]
        assert [ids[bytes(one["bytes"])] for one in shown] == tokens.tolist()
        assert [one["logprob"] for one in shown] == pytest.approx(values.tolist(), abs=1e-5)
        assert all(one["token"] == bytes(one["bytes"]).decode(errors="replace") for one in shown)
        context.append(ids[bytes(entry["bytes"])])


@pytest.mark.parametrize("temperature", [0, 2])
def test_a_completion_shows_them_by_text_with_the_token_drawn_among_them(answers, temperature):
    asked = {"prompt": "the", "max_tokens": 8, "temperature": temperature, "seed": 3}
    (choice,) = answers.predict({**asked, "logprobs": 4})["choices"]
    shown = choice["logprobs"]
    assert len(shown["top_logprobs"]) == len(shown["tokens"]) > 0
    for text, value, beside in zip(shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert len(beside) <= 5
        assert beside[text] >= value - 1e-6
        values = list(beside.values())
        assert values == sorted(values, reverse=True)
        assert temperature or next(iter(beside)) == text
    assert answers.predict({**asked, "logprobs": 0})["choices"][0]["logprobs"]["top_logprobs"] is None
