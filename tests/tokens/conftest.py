import random
from dataclasses import dataclass

import pyarrow as pa
import pytest

from lilpipe.artifact import Artifact
from lilpipe.config.tokens import TokensConfig
from lilpipe.schemas.tables import write_table
from lilpipe.stage import Metrics, Workspace
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokens.build import STAGE
from lilpipe.tokens.shards import TokenShards
from tests import artifacts

WORDS = ["fox", "dog", "the", "jumps", "über", "人工", "<|user|>", "12", "7\n", "quick", "👩‍👧", "  ", "lazy"]


def documents(count, *, seed):
    draw = random.Random(seed)
    return [f"{seed}/{index} " + " ".join(draw.choices(WORDS, k=draw.randrange(0, 30))) for index in range(count)]


CORPUS = documents(60, seed=1)
EXERCISES = documents(40, seed=2)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CORPUS + EXERCISES, vocab_size=300)


@dataclass
class Built:
    """What a run of the stage left."""

    workspace: Workspace
    metrics: Metrics
    shards: TokenShards

    def files(self):
        """Bytes of each file that is content."""
        output = self.workspace.output
        paths = [path for path in sorted(output.rglob("*")) if path.is_file() and "report" not in path.parts]
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def inputs(tokenizer, tmp_path_factory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    tokenizer.save(root / "tokenizer")
    return {
        "corpus": artifacts.corpus(root / "corpus", CORPUS),
        "prompts": artifacts.prompts(root / "prompts", EXERCISES),
        "tokenizer": artifacts.artifact(root / "tokenizer"),
    }


def build(root, inputs, **settings):
    workspace = Workspace(root)
    config = TokensConfig(**{"shard_tokens": 300, "validation_ratio": 0.2, **settings})
    metrics = STAGE.run(config, inputs, workspace)
    return Built(workspace, metrics, TokenShards.open(workspace.output))


@pytest.fixture(scope="session")
def built(inputs, tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"), inputs)


SEVERAL = documents(90, seed=3)


def source_of(index):
    """Two of three documents are books."""
    return "songs" if index % 3 == 2 else "Big books"


@pytest.fixture(scope="session")
def several_inputs(inputs, tmp_path_factory):
    """A corpus of two sources; what else a Corpus artifact holds does not matter here."""
    path = tmp_path_factory.mktemp("several")
    columns = {
        "text": SEVERAL,
        "id": [f"doc/{index}" for index in range(len(SEVERAL))],
        "source": [source_of(index) for index in range(len(SEVERAL))],
        "language": [None if index % 2 else "en" for index in range(len(SEVERAL))],
    }
    write_table(path / "documents" / "00000.arrow", pa.table(columns), rows_per_batch=7)
    return inputs | {"corpus": artifacts.artifact(path)}


@pytest.fixture(scope="session")
def built_by_source(several_inputs, tmp_path_factory):
    return build(tmp_path_factory.mktemp("by_source"), several_inputs, streams_by="source")
