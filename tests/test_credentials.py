"""Credentials of addresses: hidden in whatever a run keeps or shows."""

import gzip
import json
import logging
import sqlite3
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from lilpipe import errors, page
from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.credentials import hide_credentials, without_credentials
from lilpipe.data.sources.files import File, compression
from lilpipe.fingerprint import CacheKey, difference
from lilpipe.launch.failure import report
from lilpipe.pipeline.run import run_step
from lilpipe.tracking import MLflowTracker
from tests.data.sources.test_remote import Server

SECRET = "planted-5EcrEt"
TEXT = "The river runs to the sea and the people of the town walk with their dogs along it. "


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/a.jsonl", "https://***@host/a.jsonl"),
        ("postgresql+psycopg://u:p@10.0.0.1:5432/db failed", "postgresql+psycopg://***@10.0.0.1:5432/db failed"),
        ("https://host/a?page=2&token=abc&x=1", "https://host/a?page=2&token=***&x=1"),
        ("s?X-Amz-Credential=AK%2F1&X-Amz-Signature=ff&x=1", "s?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        ("'https://x.blob/a?sv=1&sig=q%2B' and https://b/?api_key=1.", "'https://x.blob/a?sv=1&sig=***' and https://b/?api_key=***"),
        ("<a href='https://h/?a=1&amp;token=abc'>", "<a href='https://h/?a=1&amp;token=***'>"),
        ("mail ann@host.example; x = y; 3 tokens=4; see https://host/@ann/1", None),
        ("s3://bucket/key?versionId=7", None),
    ],
)  # fmt: skip
def test_user_password_and_secret_parameters_are_hidden_and_nothing_else(text, shown):
    assert hide_credentials(text) == (text if shown is None else shown)
    assert hide_credentials(hide_credentials(text)) == hide_credentials(text)


def test_values_of_any_depth():
    value = {"https://u:p@h/": [("https://h/?token=a", 1, None)]}
    assert without_credentials(value) == {"https://***@h/": [("https://h/?token=***", 1, None)]}


@pytest.mark.parametrize("name", ["DataError", "ConfigError", "StoreError", "StageFailure"])
def test_errors_hide_them(name, tmp_path):
    assert "pw" not in str(getattr(errors, name)("source at https://ann:pw@host/ is gone"))
    try:
        raise OSError("503, url='https://host/?token=pw'")
    except OSError as error:
        report(tmp_path, error, rank=0)
    told = json.loads((tmp_path / "raised.json").read_text())
    assert "pw" not in told["message"]
    assert "token=***" in told["traceback"]


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def config_of(url):
    corpus = CorpusConfig.model_validate(
        {
            "sources": [{"name": "web", "kind": "jsonl", "path": url}],
            **{"num_workers": 1, "quality": {"gopher_repetition": False}, "max_malformed_ratio": 0.5},
        }
    )
    return PipelineConfig.model_validate(
        {"recipe": "secret", "steps": {"corpus": {"stage": "corpus"}}, "corpus": corpus}
    )


def test_a_planted_secret_is_nowhere_in_store_tracking_and_log(server, store, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    caplog.set_level(logging.DEBUG, logger="lilpipe")
    rows = [json.dumps({"text": f"{TEXT * 5} This is number {i}."}) for i in range(20)] + ["{broken"]
    path = f"docs.jsonl.gz?page=1&token={SECRET}"
    url = server.url(path, gzip.compress("\n".join(rows).encode())).replace("://", f"://ann:{SECRET}@")
    config = config_of(url)
    tracker = MLflowTracker(config, pipeline_run="run", store=store)
    artifact, cached = run_step(config, "corpus", store=store, pipeline_run="run", listeners=[tracker])
    assert not cached
    assert artifact.manifest.metrics["documents_read"] == 21 - 1
    assert artifact.manifest.config["sources"][0]["path"].endswith("docs.jsonl.gz?page=1&token=***")
    kept = [file for root in (artifact.path, tmp_path) for file in root.rglob("*") if file.is_file()]
    assert [file for file in kept if SECRET.encode() in file.read_bytes()] == []
    tables = [file for file in kept if file.suffix == ".arrow"]
    columns = [str(pa.ipc.open_file(file).read_all().to_pylist()) for file in tables]
    assert SECRET not in "".join(columns)
    assert "token=***:20" in "".join(columns)
    captured = capfd.readouterr()
    assert SECRET not in caplog.text + captured.out + captured.err
    params = sqlite3.connect(tmp_path / "mlflow.db").execute("select key, value from params").fetchall()
    assert any("token=***" in value for _, value in params)


def test_another_signature_of_the_same_address_is_the_same_source(server, store):
    content = "\n".join(json.dumps({"text": f"{TEXT * 5} This is number {i}."}) for i in range(20)).encode()
    found = []
    for token in ("one", "two"):
        config = config_of(server.url(f"docs.jsonl?token={token}", content))
        found.append(run_step(config, "corpus", store=store, pipeline_run="run"))
    assert [cached for _, cached in found] == [False, True]


def test_a_setting_that_is_no_address_counts_whole_and_is_shown_hidden():
    """A template or an option decides what a stage makes: two of them must not share a cache key."""
    first, second = (
        EvaluateConfig.model_validate({"judge": {"template": f"{{question}}{{first}}{{second}} ?token={value}"}})
        for value in ("one", "two")
    )
    assert first.identity() != second.identity()
    keys = [CacheKey("evaluate", each.identity(), {}, {}, {}, {}) for each in (first, second)]
    assert keys[0].fingerprint != keys[1].fingerprint
    assert difference(*keys) == []


def test_long_runs_without_an_address_take_linear_time():
    text = "a" * 2_000_000 + "=@"
    assert hide_credentials(text) == text
    assert hide_credentials("x://" * 200_000 + "@") != ""


def test_a_page_hides_them():
    assert "pw" not in page.render("t", {"s": page.note("see https://ann:pw@host/?a=1&token=pw")})


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.gz?token=***", ".gz"), ("odd?name.zst", ".zst"), ("a.jsonl?x=1", ""), ("A.GZ", ".gz")]
)
def test_the_query_of_a_url_is_no_part_of_the_suffix(name, suffix):
    assert compression(File("", name, 1)) == suffix


def test_a_source_that_fails_is_named_without_its_secret(server, store):
    config = config_of(server.url("docs.jsonl", b"").replace("docs.jsonl", f"gone.jsonl?token={SECRET}"))
    with pytest.raises(errors.DataError, match=r"gone\.jsonl\?token=\*\*\*"):
        run_step(config, "corpus", store=store, pipeline_run="run")


def test_the_job_of_a_stage_that_failed_is_readable_by_its_owner_only(server, store):
    config = config_of(server.url(f"docs.jsonl?token={SECRET}", b"{broken\n" * 30))
    with pytest.raises(errors.DataError):
        run_step(config, "corpus", store=store, pipeline_run="run")
    [job] = Path(store.root).rglob("job.json")
    assert job.stat().st_mode & 0o77 == 0
    others = [file for file in Path(store.root).rglob("*") if file.is_file() and file != job]
    assert [file for file in others if SECRET.encode() in file.read_bytes()] == []
