"""The same small model in lilpipe and in transformers, and a tokenizer of words, for comparisons with TRL."""

import pytest

from lilpipe.config.model import ModelConfig
from lilpipe.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, PADDING = 32, 0
CONFIG = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)


def our_model(seed):
    model = Transformer(CONFIG, VOCAB_SIZE)
    model.init_weights(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # far from uniform, so that a wrong mask or shift shows
    return model


def their_model(ours):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        intermediate_size=CONFIG.intermediate_size,
        max_position_embeddings=CONFIG.max_seq_len,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=PADDING,
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCAB_SIZE)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
