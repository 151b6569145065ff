"""The layouts in which the toy is trained."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lilpipe.config.parallel import ParallelDims
from tests.parallel import toy

DOCUMENTS: dict[str, Any] = {"intra_document_masking": True}
INTERLEAVED: dict[str, Any] = {"schedule": "interleaved", "stages_per_worker": 2}
ZERO_BUBBLE: dict[str, Any] = {"schedule": "zero_bubble", "stages_per_worker": 2}
UNTIED: dict[str, Any] = {"tie_embeddings": False, "logit_softcap": 5.0}
GPT2: dict[str, Any] = {"architecture": "gpt2", "num_kv_heads": 8, "dropout": 0.1}
MOE: dict[str, Any] = {
    "qk_norm": True,
    "dropout": 0.1,
    "moe": {"num_experts": 4, "moe_intermediate_size": 16, "bias_update_rate": 0.01},
}
MLA: dict[str, Any] = {
    "mla": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
}
GEMMA2: dict[str, Any] = {
    "architecture": "gemma2",
    "head_dim": 6,
    "sliding_window": 5,
    "attn_logit_softcap": 3.0,
    "logit_softcap": 5.0,
    "query_pre_attn_scalar": 20.0,
}
GPT_NEOX: dict[str, Any] = {"architecture": "gpt_neox", "num_kv_heads": 8, "partial_rotary_factor": 0.5, "dropout": 0.1}
OLMO3: dict[str, Any] = {
    "architecture": "olmo3",
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
    "rope_local_theta": 50.0,
    "nope_layers": (1,),
}
QWEN3_MOE: dict[str, Any] = {
    "architecture": "qwen3_moe",
    "attention_bias": True,
    "moe": MOE["moe"]
    | {"scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 0, "bias_update_rate": 0.0},
}
LATENT_MOE: dict[str, Any] = MLA | {"moe": MOE["moe"]}


@dataclass(frozen=True)
class Case:
    """One layout, and what is trained in it."""

    name: str
    layout: ParallelDims
    dtype: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self):
        return prod(self.layout)

    @property
    def tolerance(self):
        return 1e-12 if self.dtype == torch.float64 else 2e-6

    def config(self):
        return toy.config(self.layout, **self.settings)


def case(name, *, pipeline=1, replicate=1, shard=1, context=1, tensor=1, dtype=torch.float64, **settings):
    return Case(name, ParallelDims(pipeline, replicate, shard, context, tensor), dtype, settings)


CASES = [
    case("ddp2", replicate=2),
    case("ddp4", replicate=4, **DOCUMENTS),
    case("fsdp2", shard=2),
    case("fsdp4", shard=4, **DOCUMENTS),
    case("hsdp2x2", replicate=2, shard=2, model=UNTIED),
    case("tp2", tensor=2, model=UNTIED),
    case("tp4", tensor=4, **DOCUMENTS),
    case("fsdp2 x tp2", shard=2, tensor=2, **DOCUMENTS),
    case("cp2", context=2),
    case("cp4", context=4, **DOCUMENTS),
    case("cp2 x tp2", context=2, tensor=2, **DOCUMENTS),
    case("fsdp2 x cp2", shard=2, context=2, **DOCUMENTS),
    case("pp2", pipeline=2, model=UNTIED, **DOCUMENTS),
    case("pp4", pipeline=4),
    case("pp2 interleaved", pipeline=2, **INTERLEAVED, **DOCUMENTS),
    case("pp2 zero bubble", pipeline=2, **ZERO_BUBBLE),
    case("pp2 x tp2", pipeline=2, tensor=2, **DOCUMENTS),
    case("pp2 x cp2", pipeline=2, context=2, **DOCUMENTS),
    case("pp2 x ddp2 interleaved", pipeline=2, replicate=2, **INTERLEAVED),
    case("pp2 x fsdp2 zero bubble", pipeline=2, shard=2, **ZERO_BUBBLE),
    case("gpt2 tp2", tensor=2, model=GPT2),
    case("gemma2 cp2 x tp2", context=2, tensor=2, model=GEMMA2, **DOCUMENTS),
    case("gpt_neox tp2", tensor=2, model=GPT_NEOX),
    case("olmo3 pp2 x cp2", pipeline=2, context=2, model=OLMO3),
    case("qwen3_moe fsdp2 x tp2", shard=2, tensor=2, model=QWEN3_MOE, **DOCUMENTS),
    case("moe pp2 x cp2", pipeline=2, context=2, model=MOE),
    case("mla moe fsdp2 x cp2", shard=2, context=2, model=LATENT_MOE),
    case("muon fsdp2 x tp2", shard=2, tensor=2, optimizer="muon"),
    case("cp2 x tp2 recomputed", context=2, tensor=2, activation_checkpointing="full"),
    case("pp2 x fsdp2 recomputed", pipeline=2, shard=2, activation_checkpointing="selective", **DOCUMENTS),
    case("fsdp4 in float32", shard=4, dtype=torch.float32, **DOCUMENTS),
    case("cp2 x tp2 in float32", context=2, tensor=2, dtype=torch.float32, **DOCUMENTS),
    case("pp2 x fsdp2 in float32", pipeline=2, shard=2, dtype=torch.float32),
]
"""Of two or four processes."""
MORE = [
    case("ddp2 x tp2", replicate=2, tensor=2),
    case("ddp2 x cp2", replicate=2, context=2),
    case("pp2 x tp2 zero bubble", pipeline=2, tensor=2, **ZERO_BUBBLE),
    case("pp2 x fsdp2", pipeline=2, shard=2, **DOCUMENTS),
    case("gpt2 cp2 x tp2", context=2, tensor=2, model=GPT2),
    case("gpt2 pp2 x tp2", pipeline=2, tensor=2, model=GPT2),
    case("moe tp2", tensor=2, model=MOE),
    case("moe fsdp2 x tp2", shard=2, tensor=2, model=MOE),
    case("mla tp2", tensor=2, model=MLA),
    case("mla moe pp2 x tp2", pipeline=2, tensor=2, model=LATENT_MOE, **DOCUMENTS),
    case("muon pp2 x cp2", pipeline=2, context=2, optimizer="muon"),
    case("moe pp2 zero bubble recomputed", pipeline=2, **ZERO_BUBBLE, model=MOE, activation_checkpointing="full"),
    case("fsdp4 compiled", shard=4, compile=True, **DOCUMENTS),
    case("cp2 x tp2 compiled", context=2, tensor=2, compile=True),
    case("pp2 x fsdp2 compiled", pipeline=2, shard=2, compile=True),
]
"""Of two or four processes, for the slower suite."""
LOW: dict[str, Any] = {"precision": "bf16", "dtype": torch.float32}
BFLOAT16 = [
    case("one in bfloat16", **LOW),
    case("fsdp4 in bfloat16", shard=4, **LOW),
    case("ddp4 in bfloat16", replicate=4, **LOW),
    case("cp2 x tp2 in bfloat16", context=2, tensor=2, **LOW),
    case("pp2 x ddp2 in bfloat16", pipeline=2, replicate=2, **LOW),
]
"""The first is one process, too."""
EIGHT = [
    case("pp2 x ddp2 x tp2", pipeline=2, replicate=2, tensor=2, **DOCUMENTS),
    case("pp2 x fsdp2 x cp2 zero bubble", pipeline=2, shard=2, context=2, **ZERO_BUBBLE, **DOCUMENTS),
    case("pp2 x cp2 x tp2 interleaved", pipeline=2, context=2, tensor=2, **INTERLEAVED),
    case("pp4 x fsdp2", pipeline=4, shard=2, model=UNTIED),
    case("hsdp2x2 x tp2", replicate=2, shard=2, tensor=2, **DOCUMENTS),
    case("hsdp2x2 x cp2", replicate=2, shard=2, context=2),
    case("ddp2 x cp2 x tp2", replicate=2, context=2, tensor=2, **DOCUMENTS),
    case("fsdp2 x cp2 x tp2", shard=2, context=2, tensor=2, **DOCUMENTS),
    case("moe pp2 x fsdp2 x tp2", pipeline=2, shard=2, tensor=2, model=MOE),
    case("muon hsdp2x2 x tp2", replicate=2, shard=2, tensor=2, optimizer="muon"),
    case("hsdp2x2 x tp2 in float32", replicate=2, shard=2, tensor=2, dtype=torch.float32, **DOCUMENTS),
    case("pp2 x cp2 x tp2 in float32", pipeline=2, context=2, tensor=2, dtype=torch.float32, **DOCUMENTS),
]
"""Of eight processes."""
