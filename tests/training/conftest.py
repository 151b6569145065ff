"""A tokenizer of bytes, and token shards of it."""

import numpy as np
import pytest
import torch

from lilpipe.config.tokens import TokenizerConfig
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokens.shards import TOKENIZER_FOLDER, TokenizedDocument, shard_folder, write_index, write_shard
from tests.alignment.conftest import as_artifact


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More threads than that cost more than they give to models this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)


def write_tokens(directory, tokenizer, texts):
    """A TokenShards artifact; ``texts`` maps source to split to documents."""
    for source, splits in texts.items():
        for split, documents in splits.items():
            rows = [
                TokenizedDocument(
                    f"{source}/{index}",
                    source,
                    len(text.encode()),
                    np.array([*tokenizer.encode(text), tokenizer.document_end_id]),
                )
                for index, text in enumerate(documents)
            ]
            path = directory / shard_folder(source, split) / "00000.arrow"
            write_shard(path, rows, vocab_size=tokenizer.vocab_size, next_document=len(rows))
    tokenizer.save(directory / TOKENIZER_FOLDER)
    write_index(directory, tokenizer, sorted(texts))
    return as_artifact(directory, kind="TokenShards")


@pytest.fixture(scope="session")
def tokens(tokenizer, tmp_path_factory):
    texts = {
        "corpus": {"train": ["the cat sat on the mat. "] * 60, "validation": ["the mat sat on the cat. "] * 6},
        "exercises": {"train": ["1 2 3 -> 3 2 1\n"] * 60, "validation": ["2 1 3 -> 3 1 2\n"] * 6},
    }
    return write_tokens(tmp_path_factory.mktemp("tokens"), tokenizer, texts)
