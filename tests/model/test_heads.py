import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.heads import (
    HeadModel,
    last_outputs,
    load_head_model,
    pad_rows,
    read_labels,
    save_head_model,
    with_head,
)
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from tests.model.options import of_family

CONFIG = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)
ROWS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def tokenizer():
    return BytePairTokenizer({bytes([byte]): byte for byte in range(256)}, TokenizerConfig().pattern)


def head_model(tokenizer, num_outputs=3, **settings) -> HeadModel:
    model = Transformer(CONFIG.model_copy(update=settings), tokenizer.vocab_size)
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data.mul_(8) if parameter.dim() > 1 else None
    return with_head(model, num_outputs, seed=0).eval()


def outputs_of(model, tokenizer):
    tokens_BT, lengths_B = pad_rows(ROWS, padding_id=tokenizer.padding_id)
    with torch.no_grad():
        return last_outputs(model(tokens_BT), lengths_B)


def test_an_output_is_a_linear_function_of_the_last_hidden_state(tokenizer):
    model = head_model(tokenizer)
    got = outputs_of(model, tokenizer)
    with torch.no_grad():
        for row, ids in enumerate(ROWS):
            hidden_D = model.model(torch.tensor([ids]))[0, -1]
            torch.testing.assert_close(got[row], model.score.weight @ hidden_D, atol=1e-6, rtol=1e-5)
    assert got.dtype == torch.float32


def test_the_decoder_is_shared_and_the_head_follows_from_the_seed(tokenizer):
    model = Transformer(CONFIG, tokenizer.vocab_size)
    first, again, other = (with_head(model, 2, seed=seed) for seed in (0, 0, 1))
    assert first.model is model.model
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_embeddings": False},
        {"qk_norm": True},
        {**of_family("gpt2"), "num_kv_heads": 2},
        {**of_family("gpt_neox"), "num_kv_heads": 2},
        {**of_family("gemma3_text"), "sliding_window": 3, "rope_local_theta": 50.0},
        {**of_family("phi3")},
    ],
    ids=["llama", "untied", "qwen3", "gpt2", "gpt_neox", "gemma3", "phi3"],
)
def test_a_model_that_is_saved_comes_back_and_transformers_computes_the_same(tmp_path, tokenizer, settings):
    transformers = pytest.importorskip("transformers")
    model = head_model(tokenizer, **settings)
    save_head_model(model, tokenizer, tmp_path, labels=["ham", "spam", "other"])
    loaded, _ = load_head_model(tmp_path)
    expected = outputs_of(model, tokenizer)
    assert torch.equal(outputs_of(loaded, tokenizer), expected)
    assert read_labels(tmp_path) == ["ham", "spam", "other"]

    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens_BT, _ = pad_rows(ROWS, padding_id=tokenizer.padding_id)
    with torch.no_grad():
        got = theirs.eval()(input_ids=tokens_BT, attention_mask=(tokens_BT != tokenizer.padding_id).long()).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label[1] == "spam"


def test_a_language_model_is_no_model_with_a_head_and_the_reverse(tmp_path, tokenizer):
    model = head_model(tokenizer)
    save_head_model(model, tokenizer, tmp_path / "head")
    with pytest.raises(ArtifactError, match=r"score\.weight: got \(3, 16\), expected nothing"):
        load_model(tmp_path / "head")
    language_model = Transformer(CONFIG, tokenizer.vocab_size)
    save_model(language_model, tokenizer, tmp_path / "language")
    with pytest.raises(ArtifactError, match=r"score\.weight is missing"):
        load_head_model(tmp_path / "language")
