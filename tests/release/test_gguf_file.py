"""GGUF files, read back by the ``gguf`` package and, in slow tests, run by llama.cpp."""

import hashlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lilpipe.errors import ConfigError
from lilpipe.release.gguf_file import interleave, write_gguf
from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer
from tests.tokenizer.foreign import SENTENCES, write

gguf = pytest.importorskip("gguf")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama, not tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama 3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
}


def tokenizer(pattern="llama3"):
    merges = [b"th", b"the", b" a", b"in", b"ing", b" th"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    return BytePairTokenizer(ranks, pattern)


def checkpoint(directory, name, tokens=None):
    """A random model of transformers with large weights, and a tokenizer, by default ours, beside it."""
    model_class, config_class, changes = MODELS[name]
    tokens = tokens or tokenizer()
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE, vocab_size=tokens.vocab_size + 3, **changes)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokens.save(directory)
    return model.eval(), tokens


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return reader, tensors


def test_tensors_are_those_of_the_checkpoint(tmp_path):
    model, _ = checkpoint(tmp_path / "model", "llama, not tied")
    write_gguf(tmp_path / "model", tmp_path / "f32.gguf", "F32", name="m")
    _, tensors = read(tmp_path / "f32.gguf")
    state = model.state_dict()
    assert len(tensors) == len(state)
    np.testing.assert_array_equal(tensors["output.weight"], state["lm_head.weight"])
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"])
    # Row 2 i of a head is Hugging Face's row i, row 2 i + 1 its row i + 8 (a head has 16 rows).
    query = state["model.layers.0.self_attn.q_proj.weight"].view(4, 16, 64)
    stored = tensors["blk.0.attn_q.weight"].reshape(4, 16, 64)
    np.testing.assert_array_equal(stored[:, 0::2], query[:, :8])
    np.testing.assert_array_equal(stored[:, 1::2], query[:, 8:])


def test_interleave_keeps_the_rows_of_other_heads_apart():
    rows = torch.arange(12)[:, None]
    assert interleave(rows, 3).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]


@pytest.mark.parametrize(("file_type", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_0", 0.15)])
def test_lower_precision_is_close_and_norms_stay_in_float32(tmp_path, file_type, tolerance):
    model, _ = checkpoint(tmp_path / "model", "qwen3")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", file_type, name="m")
    reader, tensors = read(tmp_path / "m.gguf")
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    got = tensors["blk.0.ffn_up.weight"]
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == file_type
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q_norm.weight"] == "F32"


def test_vocabulary_has_all_ids_with_their_kinds(tmp_path):
    _, tokens = checkpoint(tmp_path / "model", "llama")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")
    reader, _ = read(tmp_path / "m.gguf")
    fields = reader.fields
    names = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert len(names) == len(kinds) == tokens.vocab_size + 3
    assert (names[tokens.user_id], kinds[tokens.user_id]) == ("<|user|>", 3)
    assert (names[-1], kinds[-1]) == (f"[PAD{tokens.vocab_size + 2}]", 5)
    assert fields["tokenizer.ggml.merges"].contents()[0] == "t h"
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert "<|assistant|>" in fields["tokenizer.chat_template"].contents()


def test_equal_checkpoints_give_equal_bytes(tmp_path):
    checkpoint(tmp_path / "model", "llama")
    for name in ("a", "b"):
        write_gguf(tmp_path / "model", tmp_path / name, "Q8_0", name="m")
    first, second = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab")
    assert first == second


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path):
    checkpoint(tmp_path / "model", "llama")
    tokenizer("single_digits").save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"release\.gguf: got the pre-tokenizer .* expected one that llama\.cpp has"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")


def test_an_architecture_without_a_row_is_refused(tmp_path):
    checkpoint(tmp_path / "model", "llama")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "xlnet"'))
    with pytest.raises(ConfigError, match="got a model of type 'xlnet', expected one of llama"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")


@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_pieces_for_which_llama_cpp_gives_other_ids_are_refused(tmp_path, family):
    checkpoint(tmp_path / "model", "llama, not tied")
    write(family, tmp_path / "model")
    with pytest.raises(ConfigError, match="expected the form of Llama 2"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")


# --- llama.cpp ----------------------------------------------------------------------------------------------------

TEXTS = ["the thing, in a tin", "Año 12345 — naïve 日本語 🙂", "  tabs\tand\n\nlines  ", "don't DON'T 3.14"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits_and_ids(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokens = checkpoint(tmp_path / "model", name)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F32", name="m")
    loaded = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0)
    for text in TEXTS:
        assert loaded.tokenize(text.encode(), add_bos=False) == tokens.encode(text)
    ids = [int(token) for token in torch.randint(0, tokens.vocab_size, (100,), generator=torch.Generator())]
    loaded.eval(ids)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    got = loaded.scores[: len(ids)]

    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    loaded.close()


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_llama_2_s_pieces(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens = Tokenizer.load(write("llama2", tmp_path / "tokenizer"))
    checkpoint(tmp_path / "model", "llama", tokens)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")
    loaded = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in [*SENTENCES, *TEXTS, "  two spaces", " lead"]:
        assert loaded.tokenize(text.encode(), add_bos=False) == tokens.encode(text)
    loaded.close()
