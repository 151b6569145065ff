"""The chat page in a real browser."""

import json

import pytest

from lilpipe.model.hub import save_model
from tests.generation.browser import CHROMIUM, browse
from tests.generation.serving import serving
from tests.model.checkpoints import SMALL, small_model, small_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
IDLE = "at('go').textContent === 'Send' && running === null"
ANSWER = "document.querySelector('.assistant:last-of-type')"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(SMALL.model_copy(update={"max_seq_len": 512})), small_tokenizer(), directory)
    return directory


@pytest.fixture(scope="module")
def served(checkpoint):
    with serving(checkpoint) as (client, _):
        yield client


@pytest.fixture
def tab(served):
    with browse(str(served.base_url)) as tab:
        tab.until("document.readyState === 'complete' && typeof model === 'object' && model !== null")
        yield tab


def settle(tab, *, temperature, max_tokens, system=""):
    tab.evaluate(
        f"at('temperature').value = {temperature}; at('limit').value = {max_tokens}; at('system').value = '{system}'"
    )


def say(tab, text):
    tab.evaluate(f"at('text').value = {json.dumps(text)}; at('form').requestSubmit()")


def test_a_conversation_shows_what_the_api_answers(tab, served):
    assert tab.evaluate("at('model').textContent") == "tiny"
    settle(tab, temperature=0, max_tokens=20, system="rhyme")
    messages = [{"role": "system", "content": "rhyme"}]
    for question in ("hi", "the <b>thing</b>"):
        messages.append({"role": "user", "content": question})
        say(tab, question)
        tab.until(IDLE)
        body = {"messages": messages, "temperature": 0, "max_tokens": 20}
        expected = served.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert tab.evaluate("[...document.querySelectorAll('.assistant')].pop().textContent") == expected
        messages.append({"role": "assistant", "content": expected})
    assert tab.evaluate("document.querySelectorAll('.turn b').length") == 0
    tab.evaluate("at('clear').click()")
    assert tab.evaluate("[at('talk').children.length, turns.length]") == [0, 0]


def test_stop_ends_an_answer_and_frees_its_rows(tab, served):
    settle(tab, temperature=2, max_tokens=500)
    say(tab, "hi")
    tab.until("document.querySelector('.assistant')?.textContent.length > 3")
    tab.evaluate("at('form').requestSubmit()")
    tab.until(IDLE)
    assert tab.evaluate("[...document.querySelectorAll('.note')].pop().textContent").endswith("stopped")
    for _ in range(100):
        if served.get("/health").json()["requests"] == 0:
            break
    assert served.get("/health").json()["requests"] == 0


def test_the_oldest_turns_give_way_to_a_conversation_that_no_longer_fits(tab):
    settle(tab, temperature=0, max_tokens=4)
    for _ in range(3):
        say(tab, "x" * 240)
        tab.until(IDLE)
    assert tab.evaluate("turns.length") == 4
    assert "no longer fit" in tab.evaluate("at('talk').textContent")


def test_a_question_that_cannot_be_answered_is_given_back(tab):
    say(tab, "x" * 2000)
    tab.until(IDLE)
    assert tab.evaluate("at('text').value.length") == 2000
    assert "context length is 512" in tab.evaluate("document.querySelector('.alarm').textContent")
    assert tab.evaluate("turns.length") == 0
