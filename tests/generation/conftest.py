import pytest

from lilpipe.model.hub import save_model
from tests.generation.serving import TOKENIZER, serving
from tests.model.checkpoints import SMALL, small_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(SMALL.model_copy(update={"num_layers": 2, "max_seq_len": 512})), TOKENIZER, directory)
    return directory


@pytest.fixture(scope="module")
def client(checkpoint):
    with serving(checkpoint) as (client, _):
        yield client
