import errno
import gzip
import http.client
import io
import random
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from lilpipe.config.sources import Source
from lilpipe.data.sources import remote
from lilpipe.data.sources.files import digest_files, find_files, open_file
from lilpipe.data.sources.readers import RawDocument, find_parts, read_part
from lilpipe.data.sources.remote import SourceUnavailable, is_transient
from lilpipe.errors import DataError

CONTENT = random.Random(0).randbytes(8 * 2**20)
"""More than fsspec reads ahead."""


class Server(ThreadingHTTPServer):
    """Files on loopback, behind faults that are taken one by one: a status, "cut" or "stall"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.faults = []
        self.requests = []
        self.ranges = True
        self.etag = True

    def url(self, name, content):
        self.files[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start, stop = self.range(len(content))
        self.server.requests.append((self.command, start))
        fault = self.server.faults.pop(0) if self.server.faults and with_body else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "stall":
            time.sleep(1.5)
        partial = (start, stop) != (0, len(content))
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(stop - start))
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if not self.server.ranges:
            self.send_header("Accept-Ranges", "none")
        if self.server.etag:
            self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if with_body:
            self.wfile.write(content[start : (start + stop) // 2 if fault == "cut" else stop])

    def range(self, size):
        asked = self.headers.get("Range", "")
        if not asked or not self.server.ranges:
            return 0, size
        start, stop = asked.removeprefix("bytes=").split("-")
        return int(start), min(int(stop) + 1, size)

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def find(url):
    return find_files(Source(kind="jsonl", name="mine", path=url))


def content(url):
    (file,) = find(url)
    with open_file(file) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


@pytest.mark.parametrize(
    "faults",
    [[503, 503], ["cut"], ["stall"], [429, "cut", 500, "stall"]],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_a_file_is_read_whole_across_faults_and_from_where_it_broke(server, faults):
    url = server.url("x.jsonl", CONTENT)
    server.faults = [None, *faults]
    assert content(url) == CONTENT
    assert not server.faults
    first, *others = [start for command, start in server.requests if command == "GET"]
    assert first == 0
    assert min(others) >= 5 * 2**20  # what fsspec had read ahead at most is asked for again


def test_a_server_without_ranges_is_read_from_the_start_again(server):
    server.ranges = False
    server.faults = ["cut"]
    url = server.url("x.jsonl", CONTENT)
    assert content(url) == CONTENT
    assert [command for command, _ in server.requests].count("GET") == 2


def test_waits_double_and_end(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    url = server.url("x.jsonl", CONTENT)
    (file,) = find(url)
    server.faults = [503] * 100
    with (
        pytest.raises(SourceUnavailable, match=r"x\.jsonl: failed 6 times, last error: .*503") as error,
        open_file(file) as stream,
    ):
        stream.read(1)
    assert waits == [0.001 * 2**n for n in range(5)]
    assert not isinstance(error.value, OSError | DataError)  # neither damage nor the user's to mend


def test_a_server_that_is_not_ready_is_asked_again_for_its_files(server, monkeypatch):
    url = server.url("x.jsonl", b'{"text": "one"}')
    refusals = iter([OSError("connection reset"), TimeoutError()])
    info = fsspec.filesystem("http").info

    def flaky(path, **kwargs):
        if error := next(refusals, None):
            raise FileNotFoundError(path) from error  # as fsspec does
        return info(path, **kwargs)

    monkeypatch.setattr(type(fsspec.filesystem("http")), "info", lambda self, path, **kwargs: flaky(path, **kwargs))
    assert [file.name for file in find(url)] == ["x.jsonl"]


def test_what_is_not_there_is_not_asked_for_again(server):
    server.url("x.jsonl", b"{}")
    with pytest.raises(DataError, match="does not exist"):
        find(f"http://127.0.0.1:{server.server_port}/absent.jsonl")
    assert not server.requests


def test_documents_come_from_a_server_whatever_their_format(server):
    rows = [f"row {n}" for n in range(1_000)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), buffer, row_group_size=100)
    lines = "".join(f'{{"text": "{row}"}}\n' for row in rows).encode()
    urls: tuple[tuple[Any, str], ...] = (
        ("parquet", server.url("x.parquet", buffer.getvalue())),
        ("jsonl", server.url("x.jsonl.gz", gzip.compress(lines))),
    )
    for kind, url in urls:
        server.faults = [503, "cut"]
        parts = find_parts(Source(kind=kind, name="mine", path=url))
        found = [row for part in parts for row in read_part(part)]
        assert [row.text for row in found if isinstance(row, RawDocument)] == rows


@pytest.mark.parametrize("etag", [True, False])
def test_a_changed_file_of_a_server_changes_the_digest(server, etag):
    server.etag = etag
    url = server.url("x.jsonl", b'{"text": "one"}')
    before = digest_files(find(url))
    assert digest_files(find(url)) == before
    server.url("x.jsonl", b'{"text": "two"}')
    assert digest_files(find(url)) != before


def caused(error, cause):
    error.__cause__ = cause
    return error


class BotocoreError(Exception):
    """The shape of botocore's ``ClientError``."""

    def __init__(self, status):
        super().__init__(status)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def requests_error(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


def aiohttp_error(status):
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


HTTP_ERRORS = (BotocoreError, requests_error, aiohttp_error)


@pytest.mark.parametrize(
    "error",
    [
        *(make(status) for make in HTTP_ERRORS for status in (408, 429, 500, 503)),
        *(OSError(number, "x") for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.EIO, errno.ESTALE)),
        *(TimeoutError(), EOFError(), OSError("error of a library"), socket.gaierror(socket.EAI_AGAIN, "x")),
        caused(FileNotFoundError("x"), TimeoutError()),
        caused(FileNotFoundError("x"), aiohttp_error(503)),
        caused(aiohttp.ClientPayloadError("x"), ValueError("x")),
        aiohttp.ServerDisconnectedError(),
        http.client.IncompleteRead(b""),
        requests.ConnectionError("x"),
    ],
    ids=repr,
)
def test_an_error_of_the_network_or_a_busy_server_is_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(make(status) for make in HTTP_ERRORS for status in (400, 401, 403, 404, 501)),
        *(OSError(number, "x") for number in (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOSPC)),
        *(FileNotFoundError("x"), PermissionError("x"), IsADirectoryError("x"), ValueError("timed out")),
        caused(FileNotFoundError("x"), aiohttp_error(404)),
        caused(OSError("x"), ssl.SSLCertVerificationError()),
        socket.gaierror(socket.EAI_NONAME, "x"),
        aiohttp.InvalidURL("x"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
        MemoryError(),
    ],
    ids=repr,
)
def test_an_error_that_another_try_does_not_change_is_permanent(error):
    assert not is_transient(error)


def test_of_botocores_errors_those_of_a_connection_are_transient():
    errors = pytest.importorskip("botocore.exceptions")
    assert is_transient(errors.EndpointConnectionError(endpoint_url="x"))
    assert is_transient(errors.ReadTimeoutError(endpoint_url="x"))
    assert not is_transient(errors.NoCredentialsError())
