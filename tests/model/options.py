"""Each kind of decoder, small."""

from lilpipe.config.families import FAMILY_OPTIONS
from lilpipe.config.model import MLAConfig, MoEConfig


def of_family(name):
    """Changes to ``SMALL`` that make the decoder of a family; ``model_copy`` fills in no defaults."""
    return {"architecture": name, **FAMILY_OPTIONS[name]}


SMALL_MOE = MoEConfig(
    num_experts=6, num_experts_per_tok=2, n_shared_experts=2, moe_intermediate_size=16, routed_scaling_factor=1.7
)
SMALL_MLA = MLAConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)

OPTIONS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "softcap": {"logit_softcap": 5.0},
    "theta": {"rope_theta": 500_000.0},
    "gpt2": {**of_family("gpt2"), "num_kv_heads": 4},
    "moe": {"moe": SMALL_MOE},
    "mla": {"mla": SMALL_MLA},
    "mla, wide values": {"mla": SMALL_MLA.model_copy(update={"q_lora_rank": None, "v_head_dim": 14})},
    "mla, moe": {"mla": SMALL_MLA, "moe": SMALL_MOE.model_copy(update={"n_shared_experts": 0})},
}
"""Changes to ``SMALL`` that make each kind of decoder."""
