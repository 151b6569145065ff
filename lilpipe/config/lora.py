"""Section of low-rank adapters."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from lilpipe.config.section import Section

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTER_DIRECTORY = "adapter"
"""Folder of an adapter in a checkpoint, beside the weights that it is merged into."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of an adapter in peft's format."""


class LoRAConfig(Section):
    """Low-rank adapters on linear layers; all other weights are frozen (Hu et al. 2021). Settings have peft's names."""

    r: PositiveInt = 8
    """Rank of the adapters."""
    lora_alpha: PositiveFloat = 16.0
    """The output of an adapter is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the adapters' inputs in training. What is dropped depends on the seed, the step, the
    sequence and the position alone."""
    target_modules: Literal["all-linear"] | Annotated[tuple[Projection, ...], Field(min_length=1)] = "all-linear"
    """Linear layers with an adapter. `all-linear` is all of them except the output layer, which matches full
    fine-tuning best (Dettmers et al. 2023)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which keeps high ranks effective (rsLoRA, Kalajdzievski 2023)."""
    use_dora: bool = False
    """Also train the norm of each row of the adapted weights (DoRA, Liu et al. 2024); a step takes longer."""
    load_in_4bit: bool = False
    """Keep the frozen weights of the adapted layers in 4 bits, type NF4 (QLoRA, Dettmers et al. 2023; extra `qlora`).
    Experimental: tested on the CPU only, never run on a GPU."""
    path: str | None = None
    """Directory of an adapter in peft's format to start from; if None, adapters start from that of the step's input
    `adapter`, or without effect."""

    @property
    def scaling(self) -> float:
        """Factor of an adapter's output."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Names of the adapted layers."""
        return get_args(Projection) if self.target_modules == "all-linear" else self.target_modules
