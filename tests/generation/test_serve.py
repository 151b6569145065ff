"""The server over real HTTP, on a port of its own, with a small random model."""

import asyncio
import copy

import httpx
import pytest
import torch
from typer.testing import CliRunner

from lilpipe.cli import app
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.generation import serve as module
from lilpipe.generation.engine import generate
from lilpipe.generation.serve import PAGE, listen
from lilpipe.model.hub import load_model
from lilpipe.model.lora import adapted_layers, add_adapters, merge, start_adapters, with_adapter
from lilpipe.model.peft_files import save_adapter
from lilpipe.model.transformer import Transformer
from tests.generation.serving import HELLO, TOKENIZER, chat, complete, serving, stream
from tests.model.test_lora import KINDS


def test_a_chat_completion_has_openais_shape_and_counts_its_tokens(client):
    answer = chat(client, model="tiny")
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["prompt_tokens"] == 5  # <|user|> h i <|end_of_turn|> <|assistant|>
    assert answer["usage"]["total_tokens"] == 5 + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"stop": ["e", "\n"]}, {"top_p": 0.5}])
def test_a_stream_says_what_the_answer_at_once_says(client, n, settings):
    settings = {**settings, "n": n, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **settings)
    chunks = stream(client, "/v1/chat/completions", {**HELLO, **settings, "stream_options": {"include_usage": True}})
    *chunks, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:n]] == [{"role": "assistant", "content": ""}] * n
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]


def test_a_text_completion_streams_what_it_says_at_once(client):
    body = {"prompt": ["the thing", "a"], "n": 2, "max_tokens": 12, "logprobs": 0}
    whole = complete(client, **body)
    chunks = stream(client, "/v1/completions", {**body, "seed": 7})
    assert whole["object"] == "text_completion"
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
    assert whole["usage"]["prompt_tokens"] == 1 + len(TOKENIZER.encode("the thing")) + 1 + len(TOKENIZER.encode("a"))


def test_token_ids_are_a_prompt_and_a_text_begins_after_the_end_of_a_document(client):
    ids = [TOKENIZER.document_end_id, *TOKENIZER.encode("the")]
    assert complete(client, ids)["choices"] == complete(client, "the")["choices"]
    assert complete(client, [ids, ids[:1]])["choices"][0] == complete(client, "the")["choices"][0]


def test_log_probabilities_are_the_models_own(client, checkpoint):
    import torch

    from lilpipe.model.hub import load_model

    model, _ = load_model(checkpoint)
    (choice,) = complete(client, "the", temperature=0, logprobs=0, max_tokens=6)["choices"]
    prompt = [TOKENIZER.document_end_id, *TOKENIZER.encode("the")]
    with torch.inference_mode():
        for expected in choice["logprobs"]["token_logprobs"]:
            logprobs = torch.log_softmax(model(torch.tensor([prompt]))[0, -1], dim=-1)
            prompt.append(int(logprobs.argmax()))
            assert logprobs.max().item() == pytest.approx(expected, abs=1e-5)


def test_the_same_seed_gives_the_same_answer_whatever_else_is_in_flight(client):
    alone = chat(client, n=2, logprobs=True)["choices"]

    async def crowd():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as other:
            bodies = [HELLO | {"n": 2, "logprobs": True}]
            bodies += [HELLO | {"seed": seed, "n": seed, "max_tokens": 5 * seed} for seed in range(1, 6)]
            posts = [other.post("/v1/chat/completions", json=body) for body in bodies]
            return [response.json()["choices"] for response in await asyncio.gather(*posts)]

    crowded = asyncio.run(crowd())
    assert [choice["message"] for choice in crowded[0]] == [choice["message"] for choice in alone]
    assert [len(choices) for choices in crowded[1:]] == [1, 2, 3, 4, 5]
    assert chat(client, seed=8)["choices"][0]["message"] != alone[0]["message"]


def test_without_a_seed_answers_differ(client):
    texts = {chat(client, seed=None)["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) > 1


def test_an_answer_ends_before_its_stop_string(client):
    text = chat(client, seed=3, max_tokens=40)["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    (choice,) = chat(client, seed=3, max_tokens=40, stop=stop)["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_an_answer_that_meets_its_limit_says_so(client):
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": None}):
        answer = chat(client, seed=1, **limit)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3


def test_a_conversation_is_put_as_in_training(client):
    messages = [
        {"role": "developer", "content": "rhyme"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    written = "<|system|>rhyme<|end_of_turn|><|user|>ab<|end_of_turn|><|assistant|>c<|end_of_turn|><|user|>d"
    ids = TOKENIZER.encode_marked(f"{written}<|end_of_turn|><|assistant|>")
    asked = {"seed": 1, "max_tokens": 8, "logprobs": None}
    chatted = chat(client, messages=messages, **asked)["choices"][0]["message"]["content"]
    assert chatted == complete(client, ids, **asked)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "expected a value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "expected a value"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages", "'poet'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "got"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": 4}, "stop", "got 4"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "only 0 is supported"),
        ({"tools": [{"type": "function"}]}, "tools", "only [] is supported"),
        ({"temprature": 1}, "temprature", "unknown parameter"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "context length is 512"),
    ],
)
def test_a_bad_request_is_refused_with_the_settings_name(client, body, param, message):
    response = client.post("/v1/chat/completions", json={**HELLO, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_a_bad_completion_is_refused_and_an_empty_text_is_none(client, body, param):
    response = client.post("/v1/completions", json={**body, "max_tokens": 2})
    assert response.status_code == (200 if param is None else 400)
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_settings_that_change_nothing_are_taken(client):
    neutral = {"frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
    plain = chat(client)["choices"]
    assert chat(client, user="me", store=False, metadata={"a": "b"}, top_logprobs=None, **neutral)["choices"] == plain


def test_an_unknown_model_is_not_found(client):
    for response in (
        client.post("/v1/chat/completions", json={**HELLO, "model": "gpt-4"}),
        client.get("/v1/models/gpt-4"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "'tiny'" in response.json()["error"]["message"]
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]


def test_adapters_are_served_beside_their_base_with_its_weights(checkpoint, tmp_path):
    base, _ = load_model(checkpoint)
    expected = {"tiny": base}
    for number, kind in enumerate(("LoRA", "DoRA")):
        model, adapters = copy.deepcopy(base), {}
        add_adapters(model, KINDS[kind], seed=number, stage="sft")
        start_adapters(model, KINDS[kind], stage="sft")
        for layer in adapted_layers(model):
            torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(number))
        plain = Transformer(base.config, base.vocab_size).eval()
        plain.load_state_dict(dict(merge(model.state_dict().items(), KINDS[kind], adapters)))
        save_adapter(adapters, KINDS[kind], tmp_path / kind, has_head=False)
        expected[kind] = plain
    folders = {kind: tmp_path / kind for kind in ("LoRA", "DoRA")}
    with serving(checkpoint, adapters=folders) as (client, _):
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == list(expected)
        assert client.get("/v1/models/DoRA").json()["id"] == "DoRA"
        answers = {name: complete(client, [3, 4, 5], model=name, max_tokens=12, temperature=0) for name in expected}
        assert complete(client, [3, 4, 5], max_tokens=12, temperature=0)["model"] == "tiny"
        unknown = client.post("/v1/completions", json={"prompt": "a", "model": "else"})
        assert unknown.json()["error"]["message"].startswith("model: got 'else', expected 'tiny' or 'LoRA' or 'DoRA'")
    sampling = SamplingConfig(temperature=0, max_new_tokens=12)
    for name, model in expected.items():
        ends = {TOKENIZER.document_end_id}
        (sample,) = generate(model, [[3, 4, 5]], sampling=sampling, stop_ids=ends, seed=0)[0]
        assert answers[name]["choices"][0]["text"] == TOKENIZER.decode(sample.tokens)
        assert answers[name]["model"] == name
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 3


@pytest.mark.parametrize("text", ["sql", "sql=", "=adapters/sql", "tiny=adapters/sql"])
def test_an_adapter_without_a_name_of_its_own_is_refused(checkpoint, text):
    refused = CliRunner().invoke(app, ["serve", str(checkpoint), "--name", "tiny", "--adapter", text])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith(f"serve: --adapter: got {text!r}, expected NAME=DIR")


def test_an_adapter_shares_the_weights_of_its_base(checkpoint, tmp_path):
    base, _ = load_model(checkpoint)
    model, adapters = copy.deepcopy(base), {}
    add_adapters(model, KINDS["LoRA"], seed=0, stage="sft")
    dict(merge(model.state_dict().items(), KINDS["LoRA"], adapters))
    save_adapter(adapters, KINDS["LoRA"], tmp_path, has_head=False)
    twin = with_adapter(base, tmp_path)
    held = dict(twin.named_parameters())
    assert all(held[name] is parameter for name, parameter in base.named_parameters())
    assert not adapted_layers(base)


def test_what_is_no_json_or_no_path_has_an_error_of_the_same_shape(client):
    broken = client.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, "not valid JSON" in broken.json()["error"]["message"]) == (400, True)
    deep = client.post("/v1/completions", content="[" * 100_000, headers={"Content-Type": "application/json"})
    assert (deep.status_code, "not valid JSON" in deep.json()["error"]["message"]) == (400, True)
    assert client.post("/v1/completions", json=[1]).json()["error"]["message"].startswith("the body")
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405


def test_other_sites_pages_are_kept_out(client):
    plain = client.post("/v1/completions", content='{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"Host": "localhost:1"}).status_code == 200
    assert "access-control-allow-origin" not in client.options("/v1/completions").headers


def test_it_listens_on_loopback_alone(checkpoint, monkeypatch):
    addresses = []
    monkeypatch.setattr(module, "make_app", lambda *_, **__: None)

    class Server:
        def __init__(self, _):
            pass

        def run(self, *, sockets):
            addresses.extend(listener.getsockname()[0] for listener in sockets)

    monkeypatch.setattr(module, "http_server", Server)
    module.serve(checkpoint, name="tiny", port=0)
    assert addresses == ["127.0.0.1"]


def test_an_address_that_is_taken_is_refused_by_name():
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
            listen("127.0.0.1", listener.getsockname()[1])


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.text == PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
