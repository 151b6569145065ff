"""Clients that come together, leave, or meet a server in trouble; over real HTTP with a small random model."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lilpipe.generation import serve as module
from lilpipe.generation.engine import Engine
from tests.generation.serving import HELLO, chat, events, serving


@pytest.fixture
def gated(checkpoint, monkeypatch):
    """A server with two rows whose engine takes a step each time that one is allowed; counts them."""
    gate = threading.Semaphore(0)
    step = Engine.step

    def allowed_step(engine):
        gate.acquire()
        return step(engine)

    monkeypatch.setattr(Engine, "step", allowed_step)
    with serving(checkpoint, max_rows=2) as (client, app):
        yield client, app, gate
        gate.release(100_000)


LONG = {**HELLO, "seed": 0, "max_tokens": 400, "n": 2}


def settle(client, gate, count, *, at_most):
    """Allow steps until so many requests are under way; says how many it took."""
    for taken in range(at_most):
        if client.get("/health").json()["requests"] == count:
            return taken
        gate.release()
        threading.Event().wait(0.02)
    raise AssertionError(f"{at_most} steps, and there are still {client.get('/health').json()['requests']} requests")


def test_a_client_that_leaves_a_stream_frees_its_rows(gated):
    client, _, gate = gated
    gate.release(3)
    with client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as response:
        assert next(response.iter_lines()).startswith("data: ")
    settle(client, gate, 0, at_most=40)
    gate.release(100)
    assert chat(client, max_tokens=5)["usage"]["completion_tokens"] <= 5


def test_a_client_that_does_not_wait_for_its_answer_frees_its_rows(gated):
    client, _, gate = gated
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=LONG, timeout=0.3)
    settle(client, gate, 0, at_most=40)


def test_a_client_that_leaves_within_its_request_is_no_error_of_the_servers(client):
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("uvicorn.error").addHandler(handler)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 99"]
    head = "\r\n".join(lines) + "\r\n\r\n{"
    try:
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
            connection.sendall(head.encode())
        for _ in range(5):  # each goes through the server's loop after the one that left
            assert client.get("/health").status_code == 200
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert [record.getMessage() for record in logged] == []


def test_others_are_answered_while_a_long_prompt_is_encoded(client, monkeypatch):
    others_answered, ask = threading.Event(), module.ChatRequest.ask

    def slow_ask(*args, **options):
        assert others_answered.wait(10)
        return ask(*args, **options)

    monkeypatch.setattr(module.ChatRequest, "ask", slow_ask)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client)
        assert client.get("/health").status_code == 200
        others_answered.set()
        assert answer.result()["choices"]


def test_more_clients_than_the_server_keeps_are_told_to_come_back(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    with serving(checkpoint) as (client, _):
        address = ("127.0.0.1", client.base_url.port)
        with socket.create_connection(address), socket.create_connection(address):
            assert client.get("/health").status_code == 503


def test_a_short_answer_does_not_wait_for_a_long_one(gated):
    client, _, gate = gated
    gate.release(3)
    with client.stream("POST", "/v1/chat/completions", json={**LONG, "n": 1, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        gate.release(30)
        assert chat(client, max_tokens=4)["usage"]["completion_tokens"] <= 4
        assert client.get("/health").json()["requests"] == 1
        gate.release(1000)
        assert events(["data: {}", *lines])[-1]["choices"][0]["finish_reason"]


def test_an_engine_that_fails_tells_those_who_wait_and_goes_on(checkpoint, monkeypatch):
    step, faults = Engine.step, [ValueError("planted")]

    def failing_step(engine):
        if faults:
            raise faults.pop()
        return step(engine)

    with serving(checkpoint) as (client, _):
        monkeypatch.setattr(Engine, "step", failing_step)
        failed = client.post("/v1/chat/completions", json=HELLO)
        assert failed.status_code == 500
        assert failed.json()["error"] == {"message": "planted", "type": "server_error", "param": None, "code": None}
        faults.append(ValueError("planted"))
        with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "planted"
        assert chat(client)["choices"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_engine_cannot_be_made_again_says_so_and_keeps_nobody_waiting(checkpoint, monkeypatch):
    def failing(*_, **__):
        raise MemoryError("planted")

    with serving(checkpoint) as (client, app):
        monkeypatch.setattr(Engine, "step", failing)
        monkeypatch.setattr(Engine, "__init__", failing)
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=HELLO, timeout=20).status_code == 500
        app.state.thread._thread.join(20)
        assert client.get("/health").status_code == 503
        assert client.post("/v1/chat/completions", json=HELLO, timeout=20).json()["error"]["message"] == "planted"


@pytest.mark.slow
def test_the_command_serves_a_directory_until_it_is_interrupted(checkpoint):
    command = [sys.executable, "-m", "lilpipe.cli", "serve", str(checkpoint), "--port", "0"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ)) as process:
        assert process.stdout
        line = process.stdout.readline()
        address = line.split()[1].removesuffix("/v1,")
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "requests": 0}
        name = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert name == checkpoint.name
