"""The layouts in which the toy is trained."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lilpipe.config.parallel import Layout
from tests.parallel import toy


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self):
        return range(prod(self.layout))

    def config(self):
        return toy.config(self.layout, **self.options)


def case(name, *, pipeline=1, replicate=1, shard=1, context=1, tensor=1, dtype=torch.float64, **options):
    return Case(name, Layout(pipeline, replicate, shard, context, tensor), dtype, options)


DOCUMENTS = {"within_documents": True}
CASES = [
    case("ddp2", replicate=2),
    case("ddp4", replicate=4, **DOCUMENTS),
    case("fsdp2", shard=2),
    case("fsdp4", shard=4, **DOCUMENTS),
    case("hsdp2x2", replicate=2, shard=2),
    case("tp2", tensor=2),
    case("tp4", tensor=4, **DOCUMENTS),
    case("tp2 softcap untied", tensor=2, logit_softcap=5.0, tie_embeddings=False),
    case("fsdp2xtp2", shard=2, tensor=2, **DOCUMENTS),
    case("ddp2xtp2", replicate=2, tensor=2),
    case("cp2", context=2),
    case("cp4", context=4, **DOCUMENTS),
    case("cp2xtp2", context=2, tensor=2, **DOCUMENTS),
    case("fsdp2xcp2", shard=2, context=2, **DOCUMENTS),
    case("ddp2xcp2", replicate=2, context=2),
    case("pp2", pipeline=2),
    case("pp2 untied", pipeline=2, tie_embeddings=False, **DOCUMENTS),
    case("pp4", pipeline=4),
    case("pp2 interleaved", pipeline=2, schedule="interleaved", stages_per_worker=2),
    case("pp2 zero bubble", pipeline=2, schedule="zero_bubble", stages_per_worker=2, **DOCUMENTS),
    case("pp2xtp2", pipeline=2, tensor=2, **DOCUMENTS),
    case("pp2xtp2 zero bubble", pipeline=2, tensor=2, schedule="zero_bubble", stages_per_worker=2),
    case("pp2xcp2", pipeline=2, context=2, **DOCUMENTS),
    case("pp2xddp2 interleaved", pipeline=2, replicate=2, schedule="interleaved", stages_per_worker=2),
    case("pp2xfsdp2", pipeline=2, shard=2),
    case("pp2xfsdp2 zero bubble", pipeline=2, shard=2, schedule="zero_bubble", stages_per_worker=2),
]
