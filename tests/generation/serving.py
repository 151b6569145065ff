"""A server over real HTTP in a thread, on a port of its own, and how it is asked."""

import json
import threading
from contextlib import contextmanager

import httpx

from lilpipe.generation.serve import http_server, listen, make_app
from tests.model.checkpoints import small_tokenizer

TOKENIZER = small_tokenizer()
HELLO = {"messages": [{"role": "user", "content": "hi"}], "seed": 7, "max_tokens": 24}


@contextmanager
def serving(checkpoint, *, host="127.0.0.1", max_rows=8, adapters=None):
    """A client of a server that runs in a thread, and the server's application."""
    with listen("127.0.0.1", 0) as listener:
        app = make_app(checkpoint, name="tiny", host=host, max_rows=max_rows, adapters=adapters)
        server = http_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield client, app
        finally:
            server.should_exit = True
            thread.join()


def chat(client, **settings):
    response = client.post("/v1/chat/completions", json={**HELLO, **settings})
    assert response.status_code == 200, response.text
    return response.json()


def complete(client, prompt, **settings):
    response = client.post("/v1/completions", json={"prompt": prompt, "seed": 7, **settings})
    assert response.status_code == 200, response.text
    return response.json()


def events(lines):
    """The chunks of a stream, which must end as OpenAI's do."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(chunk) for chunk in data[:-1]]


def stream(client, path, body):
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())
