"""Settings that ``config.json`` states in several keys, or in other values than ours: the parts of a ``Family``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lilpipe.config.model import MLAConfig, ModelConfig, MoEConfig
from lilpipe.model.family import Stated, UnsupportedError, read_keys

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
"""Names of activation functions in transformers to ours."""
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Activation:
    """The activation function of the feed-forward layer."""

    key: str = "hidden_act"
    names: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Raise ``UnsupportedError`` for another function."""
        got = stated.get(self.key)
        if not isinstance(got, str) or got not in self.names:
            raise UnsupportedError(f"{self.key}: got {got!r}, expected one of {', '.join(self.names)}")
        return {"hidden_act": self.names[got]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write our name, which transformers has as well."""
        return {self.key: config.hidden_act}


@dataclass(frozen=True)
class HeadDim:
    """The size of a head, which some classes state only if it is not hidden_size / num_heads."""

    always: bool = True

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Return None for hidden_size / num_heads."""
        width, heads = values["hidden_size"], values["num_heads"]
        got = stated.get("head_dim")
        derived = isinstance(width, int) and isinstance(heads, int) and heads > 0 and got == width / heads
        return {"head_dim": None if derived else got}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the size."""
        return {"head_dim": config.head_size} if self.always or config.head_dim is not None else {}


@dataclass(frozen=True)
class InnerSize:
    """GPT-2's size of the feed-forward layer, by default 4 * ``n_embd``."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Read the size."""
        return {"intermediate_size": stated.get("n_inner") or 4 * values["hidden_size"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the size."""
        return {"n_inner": config.intermediate_size}


@dataclass(frozen=True)
class QueryScalar:
    """The number whose square root divides attention scores; transformers requires an integer."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Read the number."""
        return read_keys(stated, {"query_pre_attn_scalar": "query_pre_attn_scalar"})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write an integer; a model with another number is not of this family."""
        return {"query_pre_attn_scalar": int(config.query_pre_attn_scalar or config.head_size)}


# --- sliding windows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One sliding window for all layers, or none."""

    switch: str | None = None
    """Key without which the window is not used."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Read the window."""
        used = self.switch is None or stated.get(self.switch, False)
        return {"sliding_window": stated.get("sliding_window") if used else None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the window, also if there is none: some classes have one by default."""
        switch = {} if self.switch is None else {self.switch: config.sliding_window is not None}
        return {**switch, "sliding_window": config.sliding_window}


Sliding = Callable[[int, Stated], bool]
"""Maps a layer and the config to whether it has the sliding window by default."""


def qwen_windows(layer: int, stated: Stated) -> bool:
    """Layers from ``max_window_layers`` on have the window."""
    return layer >= stated.get("max_window_layers", 28)


def nope_windows(layer: int, stated: Stated) -> bool:
    """Layers without RoPE have the window."""
    flags = stated.get("no_rope_layers")
    return (layer + 1) % stated.get("no_rope_layer_interval", 4) == 0 if flags is None else not flags[layer]


def every(interval: int, key: str | None = None) -> Sliding:
    """All but each ``interval``-th layer have the window; ``key`` may state another interval."""

    def sliding(layer: int, stated: Stated) -> bool:
        return (layer + 1) % (stated.get(key, interval) if key else interval) != 0

    return sliding


@dataclass(frozen=True)
class LayerWindows:
    """A sliding window for some layers."""

    sliding: Sliding
    """Layers with the window if ``layer_types`` is missing."""
    switch: str | None = None
    """Key without which no layer has a window."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Return no window if no layer has it."""
        used = self.switch is None or stated.get(self.switch, False)
        window = stated.get("sliding_window") if used else None
        layers = range(values["num_layers"])
        kinds = stated.get("layer_types")
        if kinds is None:
            kinds = [SLIDING if window and self.sliding(layer, stated) else FULL for layer in layers]
        if not isinstance(kinds, list) or len(kinds) != len(layers) or set(map(str, kinds)) - {FULL, SLIDING}:
            raise ValueError(
                f"layer_types: got {str(kinds)[:80]}, expected {FULL} or {SLIDING} for each of {len(layers)} layers"
            )
        if SLIDING not in kinds:
            return {"sliding_window": None, "layer_types": None}
        if window is None:
            raise ValueError(f"sliding_window: got null, expected a number: layer_types has {SLIDING}")
        return {"sliding_window": window, "layer_types": tuple(kinds) if FULL in kinds else None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the kind of each layer."""
        windows = [config.window(layer) for layer in range(config.num_layers)]
        kinds = [FULL if window is None else SLIDING for window in windows]
        if self.switch is None:
            return {"sliding_window": config.sliding_window, "layer_types": kinds}
        if config.sliding_window is None:
            return {self.switch: False}
        return {self.switch: True, "sliding_window": config.sliding_window, "layer_types": kinds}


# --- experts and latents --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """A mixture of experts."""

    keys: Mapping[str, str]
    """Our settings of ``moe`` to theirs."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Our settings that all models of the class share."""
    trained_bias: bool = False
    """Whether the router has a bias; our files state the rate of its update."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Their keys to the keys that newer files have instead."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """If all blocks are dense, ``moe`` is None."""
        stated = {**stated, **{old: stated[new] for old, new in self.renamed.items() if new in stated}}
        experts = {**self.fixed, **read_keys(stated, self.keys)}
        if self.trained_bias and "bias_update_rate" in stated:
            experts["bias_update_rate"] = stated["bias_update_rate"]
        first = experts["first_k_dense_replace"]
        dense = isinstance(first, int) and first >= values["num_layers"]
        return {"moe": None if dense else experts}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Without a mixture of experts (possible with MLA), ``first_k_dense_replace`` covers all blocks."""
        experts = config.moe or MoEConfig(first_k_dense_replace=config.num_layers)
        stated = {theirs: getattr(experts, ours) for ours, theirs in self.keys.items()}
        if self.trained_bias and config.moe is not None:
            stated["bias_update_rate"] = config.moe.bias_update_rate  # read by later stages only
        return stated


@dataclass(frozen=True)
class DenseLayers:
    """Qwen 3 MoE's list of layers without experts, which must be the first ones."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Read after the experts. Raises ``UnsupportedError`` for a dense layer after one with experts."""
        dense = stated.get("mlp_only_layers", [])
        if not isinstance(dense, list) or sorted(map(str, dense)) != sorted(map(str, range(len(dense)))):
            raise UnsupportedError(f"mlp_only_layers: got {str(dense)[:80]}, expected the first layers, such as [0, 1]")
        return {"moe": {**values["moe"], "first_k_dense_replace": len(dense)}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the first layers."""
        return {"mlp_only_layers": list(range(config.first_moe_layer))}


@dataclass(frozen=True)
class Latents:
    """Multi-head latent attention. RoPE pairs halves as everywhere here, unlike DeepSeek's own files."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Read its sizes."""
        return {"mla": read_keys(stated, {name: name for name in MLAConfig.model_fields})}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write its sizes; raises ``ValueError`` for a model without it."""
        if config.mla is None:
            raise ValueError("mla: missing")
        return {**config.mla.model_dump(), "num_key_value_heads": config.num_heads, "rope_interleave": False}
