"""Latent attention against transformers' DeepSeek-V3, and what its cache holds."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import generate
from lilpipe.model.mla import LatentAttention, from_interleaved
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import OPTIONS, SMALL_MLA

VOCAB = 50


def peer_config(mla, *, interleaved):
    config = DeepseekV3Config(
        hidden_size=SMALL.hidden_size,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        max_position_embeddings=SMALL.max_seq_len,
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": SMALL.rope_theta},
    )
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "v_head_dim": 14}])
def test_outputs_and_gradients_are_those_of_transformers(changes, interleaved):
    mla = SMALL_MLA.model_copy(update=changes)
    config = SMALL.model_copy(update={"mla": mla})
    model = small_model(config, vocab_size=VOCAB)
    mine = model.get_submodule("model.layers.0.self_attn")
    peer = DeepseekV3Attention(peer_config(mla, interleaved=interleaved), 0)
    peer.load_state_dict(mine.state_dict())
    if interleaved:
        weights = from_interleaved({f"self_attn.{name}": tensor for name, tensor in peer.state_dict().items()}, config)
        mine.load_state_dict({name.removeprefix("self_attn."): tensor for name, tensor in weights.items()})
    x = torch.randn(2, 11, SMALL.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    positions = torch.stack([torch.arange(11), torch.arange(3, 14)])
    mask = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
    angles = DeepseekV3RotaryEmbedding(peer.config)(x, positions)
    theirs = peer(x, angles, torch.zeros(1, 1, 11, 11).masked_fill(~mask, -torch.inf))[0]
    ours = mine(x, model.model._angles(11, positions, x.dtype)["global"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (mine_x,), (their_x,) = (torch.autograd.grad((y * weight).sum(), [x]) for y in (ours, theirs))
    torch.testing.assert_close(mine_x, their_x, atol=1e-5, rtol=1e-5)


def test_one_token_attends_to_latents_as_it_would_to_keys_and_values():
    model = small_model(SMALL.model_copy(update={"mla": SMALL_MLA}), vocab_size=VOCAB).double()
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention, LatentAttention)
    generator = torch.Generator().manual_seed(0)
    q_nope, q_rope, kv = (torch.randn(3, *s, generator=generator).double() for s in ((1, 4, 8), (1, 4, 4), (7, 1, 20)))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6], dtype=torch.bool)[:, None, None]
    torch.testing.assert_close(
        attention._attend_to_latents(q_nope, q_rope, kv, mask),
        attention._attend_to_heads(q_nope, q_rope, kv, mask),
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize("option", ["mla", "mla, moe", "moe", "qk_norm"])
def test_answers_are_those_of_whole_forward_passes(option):
    model = small_model(SMALL.model_copy(update=OPTIONS[option]), vocab_size=VOCAB)
    prompts = [[3, 14, 15, 9, 26], [5, 35], [8, 9, 7]]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12, batch_size=2)
    for prompt, answer in zip(prompts, generate(model, prompts, sampling=sampling, stop_ids=[], seed=0), strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert answer[0].tokens == tokens[len(prompt) :]
