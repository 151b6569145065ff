import logging
import uuid

import fsspec
import pytest
import torch
from hypothesis import settings

from lilpipe import stage
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.store import Store

# The same examples on every machine; `pytest --hypothesis-profile default` looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def matrix_products():
    """Each test starts with PyTorch's default, whatever the one before it served or planned."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def s3_server():
    """The address of a server with the API of S3, on loopback."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """The URL of an empty bucket; its address and keys are in the environment, as a user sets them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    url = f"s3://lilpipe-{uuid.uuid4()}"
    fsspec.core.url_to_fs(url)[0].mkdir(url)
    yield url
    fsspec.core.url_to_fs(url)[0].rm(url, recursive=True)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The folder through which faults are planted in the toy stages; they stand in for two real ones."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("LILPIPE_TOY", str(folder))
    monkeypatch.setitem(stage.STAGES, "prompts", "tests.toy")
    monkeypatch.setitem(stage.STAGES, "tokenizer", "tests.toy_reader")
    return folder


def toy_config(**settings):
    """Two steps: `first` writes, `second` reads it."""
    steps = {"first": {"stage": "prompts"}, "second": {"stage": "tokenizer", "inputs": {"prompts": "first"}}}
    return PipelineConfig.model_validate({"recipe": "toy", "steps": steps, **settings})
