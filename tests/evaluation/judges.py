"""Judges behind a real HTTP server on loopback that speaks OpenAI's chat protocol."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lilpipe.config.evaluate import JudgeConfig

ANSWERS = re.compile(r"<q>(.*)</q><a>(.*)</a><b>(.*)</b>", re.DOTALL)
TEMPLATE = "<q>{question}</q><a>{first}</a><b>{second}</b>"


def prefers_first(question, first, second):
    return "I like what comes first. [[A]]"


def prefers_shorter(question, first, second):
    if len(first) == len(second):
        return "Both are as long. [[C]]"
    return f"One is shorter.\n[[{'A' if len(first) < len(second) else 'B'}]]"


def babbles(question, first, second):
    return "Answer A says much. [[A]] But [[B]] has its charm, I could not say."


class Judging:
    """What a server was asked, and how it is to answer."""

    def __init__(self, opinion):
        self.opinion = opinion
        self.bodies = []
        self.headers = []
        self.failures = []
        """Statuses, or None for a broken connection, with which the next requests end."""
        self.most_at_once = 0
        self.pause = threading.Event()
        self.pause.set()
        self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, path, headers, body):
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.bodies.append(body)
            self.headers.append(dict(headers))
            failure = self.failures.pop(0) if self.failures else 200
        self.pause.wait(0.05)
        with self._lock:
            self._at_once -= 1
        if failure != 200:
            return failure, f"no: {headers.get('Authorization')}".encode()
        if not path.endswith("/v1/chat/completions"):
            return 200, b"<html>It works!</html>"
        match = ANSWERS.search(body["messages"][0]["content"])
        assert match
        message = {"role": "assistant", "content": self.opinion(*match.groups())}
        return 200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


@contextmanager
def serving(opinion):
    """The address of a server with this opinion, and what is known of it."""
    judging = Judging(opinion)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = judging.answer(self.path, self.headers, body)
            if status is None:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format, *args):  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", judging
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge_config(address, **settings):
    return JudgeConfig(address=address, model="wise", template=TEMPLATE, **settings)
