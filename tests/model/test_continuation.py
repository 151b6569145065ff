import pytest
import torch

from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.continuation import start_from
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.model.checkpoints import ARCHITECTURES, PATTERN, SMALL, small_model, small_tokenizer
from tests.tokenizer.foreign import with_special_tokens


@pytest.fixture
def checkpoint(tmp_path):
    save_model(small_model(), small_tokenizer(), tmp_path)
    return tmp_path


def started(checkpoint, *, tokenizer=None, **changes):
    tokenizer = tokenizer or small_tokenizer()
    config = SMALL.model_copy(update=changes)
    model = Transformer(config, tokenizer.vocab_size)
    model.init_weights(5)
    start_from(model.state_dict(), checkpoint, config=config, tokenizer=tokenizer)
    return model


def test_weights_are_the_checkpoints_under_longer_sequences_and_another_base(checkpoint):
    model = started(checkpoint, max_seq_len=128, rope_theta=9000.0, dropout=0.1)
    for name, tensor in small_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_special_tokens_of_ours_are_added_behind_a_foreign_vocabulary(tmp_path):
    """As with GPT-2: its vocabulary as the base, its end of text where our end of a document stands."""
    ranks = small_tokenizer().ranks
    foreign = with_special_tokens(ranks, PATTERN, ["<|endoftext|>"], document_end="<|endoftext|>")
    save_model(small_model(vocab_size=foreign.vocab_size), foreign, tmp_path / "model")
    stored, _ = load_model(tmp_path / "model")
    extended = BytePairTokenizer(ranks, PATTERN)
    assert extended.document_end_id == foreign.document_end_id
    model = started(tmp_path / "model", tokenizer=extended)
    rows, old = model.output_weight, foreign.vocab_size
    assert torch.equal(rows[:old], stored.output_weight)
    torch.testing.assert_close(rows[old:], stored.output_weight.mean(0).expand(len(rows) - old, -1))
    assert len(rows) == old + 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"model\.num_layers: got 2, expected 3"),
        ({"qk_norm": True, "num_heads": 2}, r"model\.num_heads: got 2, expected 4.*set num_heads, qk_norm to"),
        (ARCHITECTURES["GLM-4.5"], r"model\.moe: got \{.*\}, expected None"),
        (ARCHITECTURES["GPT-2"], r"model\.num_kv_heads: got 4, expected 2.* norm to the checkpoint's"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_field(checkpoint, changes, message):
    with pytest.raises(ConfigError, match=message):
        started(checkpoint, **changes)


def test_positions_that_are_learned_cannot_grow(tmp_path):
    changes = ARCHITECTURES["GPT-2"]
    save_model(small_model(SMALL.model_copy(update=changes)), small_tokenizer(), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.max_seq_len: got 128, expected 64"):
        started(tmp_path, **changes, max_seq_len=128)


def test_another_vocabulary_is_refused_with_the_remedy(checkpoint):
    ranks = dict(small_tokenizer().ranks) | {b"zz": 262}
    other = BytePairTokenizer(ranks, small_tokenizer().pattern)
    with pytest.raises(
        ArtifactError, match=r"270 tokens, expected that of the token shards, 271 tokens.*tokenizer\.base"
    ):
        started(checkpoint, tokenizer=other)
