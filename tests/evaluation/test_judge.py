import json
import threading
import time

import pytest
from pydantic import ValidationError

from lilpipe.config.evaluate import EvaluateConfig, JudgeConfig
from lilpipe.errors import ConfigError, DataError, StageFailure
from lilpipe.evaluation import judge
from lilpipe.evaluation.judge import Judge, Outcome, Pairing, check_readable, parse_verdict, settle
from lilpipe.generation.serve import http_server, listen, make_app
from tests.evaluation.judges import babbles, judge_config, prefers_first, prefers_shorter, serving

PAIRS = [
    Pairing("2 + 2?", "Answer: 4", "Well, the answer is 4"),
    Pairing("3 + 3?", "It is, as they say, 6", "Answer: 6"),
    Pairing("4 + 4?", "ate", "8 8"),
    Pairing("5 + 5?", "10", "10"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")


def decide(address, tmp_path, pairs=PAIRS, *, concurrency=2, **settings):
    return Judge(judge_config(address, **settings), tmp_path / "cache", concurrency=concurrency).decide(pairs)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Both are right, the second is plainer.\n\n[[B]]", "B"),
        ("[[A]]", "A"),
        ("[[C]] \n", "C"),
        ("As I said, [[A]]. So: [[A]]", "A"),
        ("<think>[[A]] or [[B]]?</think>Neither. [[C]]", "C"),
        ("[[A]] is my verdict.", None),
        ("It is not [[A]]; it is [[B]]", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[a]]", None),
        ("answer A is better", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_only_where_it_ends_the_reply_and_stands_alone(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("straight", "swapped", "outcome"),
    [
        ("A", "B", Outcome(1.0)),
        ("B", "A", Outcome(0.0)),
        ("C", "C", Outcome(0.5)),
        ("A", "C", Outcome(0.5)),
        ("C", "A", Outcome(0.5)),
        ("A", "A", Outcome(0.5, flipped=True)),
        ("B", "B", Outcome(0.5, flipped=True)),
        (None, "A", Outcome(None)),
        ("B", None, Outcome(None)),
    ],
)
def test_a_completion_wins_only_in_both_places(straight, swapped, outcome):
    assert settle(straight, swapped) == outcome


def test_a_judge_that_prefers_the_first_place_finds_no_winner_and_is_caught(tmp_path):
    with serving(prefers_first) as (address, _):
        outcomes = decide(address, tmp_path)
    assert outcomes == [Outcome(0.5, flipped=True)] * 3 + [Outcome(0.5)]


def test_a_judge_that_prefers_the_shorter_completion_prefers_it_wherever_it_stands(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        assert decide(address, tmp_path) == [Outcome(1.0), Outcome(0.0), Outcome(0.5), Outcome(0.5)]
    assert len(asked.bodies) == 6  # two for each pair of completions that differ
    assert all(body["model"] == "wise" and body["temperature"] == 0 for body in asked.bodies)


def test_nothing_is_asked_twice_after_a_kill(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        decide(address, tmp_path, PAIRS[:2])
        first = len(asked.bodies)
        outcomes = decide(address, tmp_path)
    assert (first, len(asked.bodies)) == (4, 6)
    assert outcomes == [Outcome(1.0), Outcome(0.0), Outcome(0.5), Outcome(0.5)]


def test_another_model_or_template_is_asked_anew(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        decide(address, tmp_path, PAIRS[:1])
        other = judge_config(address).model_copy(update={"model": "wiser"})
        Judge(other, tmp_path / "cache", concurrency=1).decide(PAIRS[:1])
    assert [body["model"] for body in asked.bodies] == ["wise", "wise", "wiser", "wiser"]


def test_a_request_that_fails_is_tried_again(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        asked.failures = [500, 429, None]
        assert decide(address, tmp_path, PAIRS[:1], concurrency=1) == [Outcome(1.0)]
    assert len(asked.bodies) == 5


def test_an_address_that_stays_down_fails_the_stage_and_keeps_what_it_answered(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        asked.failures = [200, 503, 503]
        with pytest.raises(StageFailure, match=r"did not answer in 2 tries, the last ended in HTTP 503"):
            decide(address, tmp_path, PAIRS[:1], concurrency=1, max_retries=1)
        decide(address, tmp_path, PAIRS[:1], concurrency=1)
    assert len(asked.bodies) == 1 + 2 + 1
    with pytest.raises(StageFailure, match=r"did not answer in 1 tries, the last ended in URLError.*refused"):
        decide(address, tmp_path, PAIRS[1:2], max_retries=0)


def test_a_judge_that_takes_too_long_is_given_up(tmp_path):
    with serving(prefers_shorter) as (address, asked):
        asked.pause.clear()
        with pytest.raises(StageFailure, match="TimeoutError"):
            decide(address, tmp_path, PAIRS[:1], max_retries=0, timeout_seconds=0.01)


def test_no_more_requests_are_under_way_at_once_than_was_said(tmp_path):
    pairs = [Pairing(str(number), "a", "bb") for number in range(6)]
    with serving(prefers_shorter) as (address, asked):
        asked.pause.clear()
        decide(address, tmp_path, pairs, concurrency=3)
    assert asked.most_at_once <= 3


def test_garbage_has_no_verdict_and_a_judge_that_gives_nothing_else_is_refused(tmp_path):
    with serving(babbles) as (address, _):
        outcomes = decide(address, tmp_path)
    assert outcomes == [Outcome(None)] * 3 + [Outcome(0.5)]
    assert check_readable(outcomes) == 0.75
    with pytest.raises(DataError, match=r"none of the 3 games got a verdict that could be read.*judge.template"):
        check_readable(outcomes[:3])


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"3"])
def test_a_reply_of_another_protocol_is_refused(body):
    with pytest.raises(ConfigError, match=r"http://here answered .*expected a chat completion"):
        judge.read_reply(body, address="http://here")


def test_a_model_that_says_nothing_has_said_nothing():
    assert judge.read_reply(b'{"choices": [{"message": {"content": null}}]}', address="") == ""


def test_the_key_is_sent_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with serving(prefers_shorter) as (address, asked):
        decide(address, tmp_path, PAIRS[:1], api_key_variable="JUDGE_KEY")
        asked.failures = [401]
        with pytest.raises(ConfigError, match=r"refused model 'wise' with HTTP 401: no: Bearer \*\*\*;"):
            decide(address, tmp_path, PAIRS[1:2], concurrency=1, api_key_variable="JUDGE_KEY")
    assert {headers["Authorization"] for headers in asked.headers} == {"Bearer sesame"}
    assert not any("sesame" in path.read_text() for path in (tmp_path / "cache").iterdir())
    assert "sesame" not in json.dumps(judge_config(address, api_key_variable="JUDGE_KEY").model_dump())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="the environment has no JUDGE_KEY"):
        decide(address, tmp_path, api_key_variable="JUDGE_KEY")


def test_what_is_asked_is_in_the_fingerprint_and_how_it_is_delivered_is_not():
    base = JudgeConfig(model="wise")
    for change in ({"model": "wiser"}, {"template": "{question}{first}{second}"}, {"num_prompts": 3}):
        assert JudgeConfig(**{"model": "wise", **change}).identity() != base.identity()
    delivery = JudgeConfig(
        model="wise",
        address="http://elsewhere/v1",
        api_key_variable="K",
        concurrency=9,
        timeout_seconds=1,
        max_retries=0,
    )
    assert delivery.identity() == base.identity()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{question} {first}", r"has no placeholder \{second\}"),
        ("{question} {first} {second} {x}", "cannot be formatted"),
        ("{question} {first} {second} {", "cannot be formatted"),
    ],
)
def test_a_template_that_hides_what_is_compared_is_refused(template, problem):
    with pytest.raises(ValidationError, match=problem):
        JudgeConfig(model="wise", template=template)


def test_a_judge_needs_a_name():
    with pytest.raises(ValidationError, match=r"judge\.model is empty"):
        EvaluateConfig(win_by="judge")


def test_our_own_server_may_judge(make_checkpoint, tmp_path):
    with listen("127.0.0.1", 0) as listener:
        server = http_server(make_app(make_checkpoint().path, name="wise", host="127.0.0.1", max_rows=4))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            outcomes = decide(address, tmp_path, PAIRS[:1], max_new_tokens=8)
        finally:
            server.should_exit = True
            thread.join()
    assert outcomes == [Outcome(None)]  # a model of random weights answers, and has no verdict to give
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2
