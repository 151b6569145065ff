"""Adapters on a frozen weight of 4 bits: QLoRA (Dettmers et al. 2023), with the NF4 type of bitsandbytes.

The weight is in blocks of 64 numbers with a scale each, and the scales are quantized, too: 4.13 bits per number. It is
dequantized for each use. Export merges the adapters into the dequantized weight, which is what training computed with.

Dimensions: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilpipe.config.lora import LoRAConfig
from lilpipe.errors import ConfigError
from lilpipe.model.lora import LoRALinear


def nf4_layers(device: torch.device, *, stage: str) -> Callable[[nn.Linear, LoRAConfig, str], LoRALinear]:
    """Return what makes layers of 4 bits on a device, for ``add_adapters``.

    Raises ``ConfigError`` naming the setting of ``stage`` without bitsandbytes.
    """
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{stage}.lora.load_in_4bit: bitsandbytes cannot be imported ({error}); pip install 'lilpipe[qlora]', or "
            "set load_in_4bit = false"
        ) from error
    return partial(NF4LoRALinear, device=device)


class NF4LoRALinear(LoRALinear):
    """Linear layer with an adapter, whose weight has 4 bits."""

    packed: Tensor

    def __init__(self, base: nn.Linear, config: LoRAConfig, name: str, *, device: torch.device) -> None:
        """Move the layer to ``device``, where its weight is quantized. ``name`` as in ``LoRALinear``."""
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        super().__init__(base.to(device), config, name)
        packed, state = functional.quantize_4bit(self.weight.detach(), quant_type="nf4", compress_statistics=True)
        self.register_parameter("weight", None)
        self.register_buffer("packed", packed, persistent=False)
        self.state: Any = state

    @property
    def frozen_weight(self) -> Tensor:
        """The dequantized weight, ``[O, I]``."""
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        return functional.dequantize_4bit(self.packed, self.state)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Map ``[..., I]`` to ``[..., O]``."""
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportMissingImports]

        x, adapter = input, self.adapter
        if torch.is_autocast_enabled(x.device.type):  # which bitsandbytes' functions do not see
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias_O = None if self.bias is None else self.bias.to(x.dtype)
        y = matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=bias_O)
        if adapter is None:
            return y
        weight_OI = self.packed if adapter.magnitude_O is None else self.frozen_weight  # LoRA does not use it
        return self.add_output(y, x, adapter, weight_OI, self.bias)
