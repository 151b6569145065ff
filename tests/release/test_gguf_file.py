"""GGUF files, read back by the ``gguf`` package and, in slow tests, run by llama.cpp."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
import transformers

from lilpipe.errors import ConfigError
from lilpipe.release.gguf_families import interleave
from lilpipe.release.gguf_file import write_gguf
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
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
OLMO3_ROPES = {kind: {"rope_type": "default", "rope_theta": 500_000.0} for kind in TWO_ROPES}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": None}
ALL_HEADS = {"num_key_value_heads": 4}
GPT2 = ALL_HEADS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96}
HALF = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen3, yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama, not tied": ("Llama", {"tie_word_embeddings": False}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 128, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "use_sliding_window": False, "pad_token_id": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 40, "norm_topk_prob": True, **EXPERTS},
    ),
    "phi3": ("Phi3", {"sliding_window": 128, "pad_token_id": None, "original_max_position_embeddings": 256}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {**WINDOWS, "rope_parameters": OLMO3_ROPES}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | WINDOWS | {"query_pre_attn_scalar": 32}),
    "gemma3_text": ("Gemma3", GEMMA | WINDOWS | {"query_pre_attn_scalar": 32, "rope_parameters": TWO_ROPES}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", ALL_HEADS | {"rope_parameters": HALF}),
    "gpt_neox, sequential": ("GPTNeoX", ALL_HEADS | {"use_parallel_residual": False}),
}


def tokenizer(pattern="llama3"):
    merges = [b"th", b"the", b" a", b"in", b"ing", b" th"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    return BytePairTokenizer(ranks, pattern)


def checkpoint(directory, name, tokens=None):
    """A random model of transformers with large weights, and a tokenizer, by default ours, beside it."""
    prefix, changes = MODELS[name]
    tokens = tokens or tokenizer()
    torch.manual_seed(0)
    class_name = f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    config_class = getattr(transformers, f"{'Gemma3Text' if prefix == 'Gemma3' else prefix}Config")
    config = config_class(**{**SHAPE, "vocab_size": tokens.vocab_size + 3, "attn_implementation": "eager", **changes})
    model = getattr(transformers, class_name)(config).float()
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


def test_pieces_for_which_llama_cpp_gives_other_ids_are_refused(tmp_path):
    checkpoint(tmp_path / "model", "llama, not tied")
    write("mistral", tmp_path / "model")
    with pytest.raises(ConfigError, match="expected the form of Llama 2 or Gemma"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: got False, expected True"),
        ("smollm3", {"no_rope_layers": [1] * 5}, r"no_rope_layers: got .*, expected \[1, 1, 1, 0, 1\]"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings: got True, expected False"),
        ("olmo3", {"rope_parameters": TWO_ROPES}, "rope_parameters: got"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar: got 16, expected 32"),
        ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar: got 32, expected 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: got None, expected 50"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope_type: got 'llama3', expected one of default, linear, yarn"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type: got 'longrope'"),
    ],
)
def test_settings_that_llama_cpp_fixes_otherwise_are_refused(tmp_path, name, changes, message):
    checkpoint(tmp_path / "model", name)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")


def test_without_windows_in_llama_cpp_the_context_is_the_window(tmp_path):
    for name, expected in (("mistral", 128), ("gemma3_text", 256)):
        checkpoint(tmp_path / name, name)
        write_gguf(tmp_path / name, tmp_path / "m.gguf", "F16", name="m")
        reader, _ = read(tmp_path / "m.gguf")
        (found,) = [field.contents() for key, field in reader.fields.items() if key.endswith(".context_length")]
        assert found == expected


def test_experts_are_stacked_and_the_router_stays_in_float32(tmp_path):
    model, _ = checkpoint(tmp_path / "model", "mixtral")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "Q8_0", name="m")
    reader, tensors = read(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.1.ffn_gate_exps.weight"], kinds["blk.1.ffn_gate_inp.weight"]) == ("Q8_0", "F32")
    expected = model.state_dict()["model.layers.1.mlp.experts.down_proj"].numpy()
    np.testing.assert_allclose(tensors["blk.1.ffn_down_exps.weight"], expected, atol=0.01 * np.abs(expected).max())


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

    # llama.cpp reads GELU from a table in float16, and computes its tanh approximation also for GPT-NeoX.
    tolerance = 1e-3 if name.startswith(("gemma", "gpt")) else 2e-5
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    loaded.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen", "smollm2", "gpt_neox", "llama2", "phi3", "gemma"])
def test_llama_cpp_gives_the_ids_of_the_tokenizer(tmp_path, family):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens = Tokenizer.load(write(family, tmp_path / "tokenizer"))
    checkpoint(tmp_path / "model", "llama", tokens)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", name="m")
    loaded = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    draw = random.Random(1)
    parts = [*"abcdefgh ", "\n", " ", "  ", "\t", "é", "日", "🙂", "1", "23", "'s", "▁", "<body>", "th", "ing", "."]
    drawn = ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(200)]
    for text in [*SENTENCES, *TEXTS, *drawn]:
        assert loaded.tokenize(text.encode(), add_bos=False) == tokens.encode(text)
    loaded.close()
