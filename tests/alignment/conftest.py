"""Tiny models over bytes, and artifacts that hold them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lilpipe import distributed
from lilpipe.alignment.questions import prompts as prompts_module
from lilpipe.artifact import Artifact, content_digest, list_files
from lilpipe.config.model import ModelConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.model.hub import save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.artifacts import make_manifest

TINY = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=160)


def as_artifact(path, *, kind, stage="", step=""):
    """A directory as an artifact, without a store."""
    manifest = make_manifest(kind=kind, stage=stage, step=step or stage, fingerprint="", files=list_files(path))
    return Artifact(uri=str(path), path=Path(path), manifest=manifest)


def digest_of(workspace):
    """Digest over a stage's data files."""
    return content_digest(list_files(workspace.output))


@pytest.fixture
def as_workers(monkeypatch):
    """Calls a function of the rank on every rank at once, as threads that meet at the barrier."""

    def call(num_workers, function):
        local = threading.local()
        monkeypatch.setattr(distributed, "rank", lambda: local.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: num_workers)
        monkeypatch.setattr(distributed, "barrier", threading.Barrier(num_workers, timeout=60).wait)

        def work(rank):
            local.rank = rank
            return function(rank)

        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(work, range(num_workers)))

    return call


@pytest.fixture(scope="session")
def tokenizer():
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer, tmp_path_factory):
    def make(seed=0, *, stage="sft", step="", scale=6.0):
        model = Transformer(TINY, tokenizer.vocab_size)
        model.init_weights(seed)
        for parameter in model.parameters():  # sharper than fresh weights, so that answers differ from noise
            parameter.data.mul_(scale) if parameter.dim() > 1 else None
        directory = tmp_path_factory.mktemp("checkpoint")
        save_model(model, tokenizer, directory)
        return as_artifact(directory, kind="Checkpoint", stage=stage, step=step)

    return make


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A small Prompts artifact of every family."""
    workspace = Workspace(tmp_path_factory.mktemp("prompts"))
    config = PromptsConfig(
        families=tuple(prompts_module.FAMILIES),
        num_documents=200,
        num_demonstrations=50,
        num_train=60,
        num_validation=20,
        num_test=20,
    )
    prompts_module.run(config, {}, workspace)
    return as_artifact(workspace.output, kind="Prompts", stage="prompts")


@pytest.fixture(scope="session")
def word_tokenizer():
    """For TRL's trainers, with a word for each token."""
    from tests.alignment.twins import words  # transformers takes seconds to import

    return words()
