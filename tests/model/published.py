"""Small random models of architectures that the decoder does not have, as transformers publishes them."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.model.checkpoints import small_tokenizer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
PUBLISHED = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.5},  # learned positions, another width of the head
    "mamba": {"state_size": 8},  # no attention
    "cohere": {"logit_scale": 0.25},  # scaled logits
    "phi": {},  # an output layer with a bias
    "vaultgemma": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {  # scaling of positions that the decoder does not compute, though it has the architecture
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0] * 4}
        | {"original_max_position_embeddings": 64, "rope_theta": 1e4},
        "original_max_position_embeddings": 64,
    },
    "deepseek_v3": {  # groups of experts
        **{"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        **{"first_k_dense_replace": 1, "moe_intermediate_size": 24},
    },
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
}
"""Settings by ``model_type``; each has something that the others do not have."""


def their_model(kind, *, seed=0, tokenizer=None, **settings):
    """A model of transformers with weights so large that a wrong layout shows."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or small_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.document_end_id}
    values = {**SIZES, "vocab_size": tokenizer.vocab_size + 3, **special, **PUBLISHED[kind], **settings}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0).add_(0.01 * torch.randn_like(parameter))
    return model


def publish(kind, directory, *, tokenizer=None, **settings):
    """Write such a model with a tokenizer; return it."""
    tokenizer = tokenizer or small_tokenizer()
    model = their_model(kind, tokenizer=tokenizer, **settings)
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return model
