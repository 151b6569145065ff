"""Parameters and operations, counted by formula, against transformers' models and torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lilpipe.config.model import MLAConfig, ModelConfig, MoEConfig
from lilpipe.model.flops import (
    forward_flops_per_token,
    num_active_parameters,
    num_parameters,
    training_flops_per_token,
)
from lilpipe.model.transformer import Transformer
from tests.model.options import of_family

VOCAB = 96
SMALL = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_seq_len=24,
    tie_embeddings=False,
)
GPT2 = SMALL.model_copy(update={**of_family("gpt2"), "num_kv_heads": 4, "tie_embeddings": True})
MOE = MoEConfig(
    num_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=20, first_k_dense_replace=1
)
MLA = MLAConfig(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def of_transformers(config):
    """The model of transformers with the same shape."""
    import transformers

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    if config.architecture == "gpt2":
        names = {"n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads}
        names |= {"n_inner": config.intermediate_size, "n_positions": config.max_seq_len}
        ties = {"tie_word_embeddings": config.tie_embeddings, "attn_implementation": "eager"}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, **names, **ties))
    if config.qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=config.head_size))
    if config.mla is None:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    moe = config.moe or MOE
    # Experts one by one: torch's counter does not see a grouped product.
    shape |= {"num_key_value_heads": config.num_heads, "experts_implementation": "eager"}
    deepseek = transformers.DeepseekV3Config(
        **shape,
        **config.mla.model_dump(),
        moe_intermediate_size=moe.moe_intermediate_size,
        n_shared_experts=moe.n_shared_experts,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        first_k_dense_replace=moe.first_k_dense_replace if config.moe else config.num_layers,
        n_group=1,
        topk_group=1,
    )
    return transformers.DeepseekV3ForCausalLM(deepseek)


SHAPES = {
    "llama": SMALL,
    "all heads of keys": changed(num_kv_heads=4),
    "tied": changed(tie_embeddings=True, num_layers=1),
    "norms of queries and keys": changed(qk_norm=True),
    "gpt2": GPT2,
    "gpt2, untied": GPT2.model_copy(update={"tie_embeddings": False}),
    "latent attention": changed(mla=MLA),
    "queries straight from the stream": changed(mla=MLA.model_copy(update={"q_lora_rank": None})),
    "experts and latent attention": changed(mla=MLA, moe=MOE),
    "all layers with experts": changed(mla=MLA, moe=MOE.model_copy(update={"first_k_dense_replace": 0})),
    "two shared experts": changed(mla=MLA, moe=MOE.model_copy(update={"n_shared_experts": 2})),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers_model_of_the_same_shape(name):
    with torch.device("meta"):
        model = of_transformers(SHAPES[name])
    assert num_parameters(SHAPES[name], VOCAB) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_our_model(name):
    model = Transformer(SHAPES[name], VOCAB)
    assert num_parameters(SHAPES[name], VOCAB) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_operations_of_a_forward_pass_are_those_that_torch_counts(name):
    config, num_tokens = SHAPES[name], 2 * 24
    model = of_transformers(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens).view(2, 24))
    assert counter.get_total_flops() == forward_flops_per_token(config, VOCAB) * num_tokens


def test_training_takes_three_forward_passes_as_torch_counts_them():
    config = changed(num_kv_heads=4)
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.arange(32).view(2, 16)).sum().backward()
    assert counter.get_total_flops() == training_flops_per_token(config, VOCAB, seq_len=16) * 32


def test_full_checkpointing_computes_the_blocks_again_and_the_output_layer_not():
    plain = training_flops_per_token(SMALL, VOCAB)
    forward, head = forward_flops_per_token(SMALL, VOCAB), 2 * VOCAB * SMALL.hidden_size
    assert training_flops_per_token(SMALL, VOCAB, recomputed="full") == plain + forward - head
    assert training_flops_per_token(SMALL, VOCAB, recomputed="selective") == plain


def test_a_token_meets_the_shared_experts_and_its_own_routed_ones():
    config = changed(mla=MLA, moe=MOE)
    idle = 2 * 3 * 32 * 20  # of 4 experts in each of 2 layers, 2 are not visited
    assert num_active_parameters(config, VOCAB) == num_parameters(config, VOCAB) - 2 * idle
    assert num_active_parameters(SMALL, VOCAB) == num_parameters(SMALL, VOCAB)


def test_operations_are_palms_six_n_and_twelve_l_h_e_t():
    config = changed(num_kv_heads=4)
    norms = (2 * 3 + 1) * 32
    multiplied = num_parameters(config, VOCAB) - norms - VOCAB * 32
    assert training_flops_per_token(config, VOCAB, seq_len=24) == 6 * multiplied + 12 * 3 * 4 * 8 * 24
