"""Settings that ``config.json`` states in several keys, or in other values than ours: the parts of a ``Family``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lilpipe.config.model import ROPE_KEYS, ROPE_OPTIONAL, MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from lilpipe.model.family import Stated, read_keys

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
"""Names of activation functions in transformers to ours."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE_NAMES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True)
class Activation:
    """The activation function of the feed-forward layer."""

    key: str = "hidden_act"
    names: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Raise ``ValueError`` for another function."""
        got = stated.get(self.key)
        if not isinstance(got, str) or got not in self.names:
            raise ValueError(f"{self.key}: got {got!r}, expected one of {', '.join(self.names)}")
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


# --- positions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """RoPE's base, scaling and rotated fraction. The base is written twice: for transformers before version 5, and
    since.
    """

    theta: float = 10_000.0
    theta_key: str = "rope_theta"
    partial: float | None = None
    """Default of the rotated fraction; None if the class always rotates whole heads."""
    partial_key: str = "partial_rotary_factor"
    scales: bool = True

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Raise ``ValueError`` for scaling that the decoder does not compute."""
        parameters = _parameters(stated, "rope_scaling") or _parameters(stated, "rope_parameters")
        given = stated.get(self.partial_key, 1.0 if self.partial is None else self.partial)
        rotated = parameters.get("partial_rotary_factor", given)
        if self.partial is None and rotated != 1:
            raise ValueError(f"partial_rotary_factor: got {rotated!r}, expected 1.0")
        return {
            "rope_theta": parameters.get("rope_theta", stated.get(self.theta_key, self.theta)),
            "rope_scaling": read_scaling(parameters, stated, values, allowed=self.scales),
            "partial_rotary_factor": rotated,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write all keys that the versions of transformers read."""
        scaling = write_scaling(config.rope_scaling)
        parameters = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
        stated = {self.theta_key: config.rope_theta, "rope_parameters": parameters}
        if self.partial is not None:
            parameters["partial_rotary_factor"] = config.partial_rotary_factor
            if (self.partial, config.partial_rotary_factor) != (1, 1):
                stated[self.partial_key] = config.partial_rotary_factor
        return stated | ({"rope_scaling": scaling} if scaling else {})


@dataclass(frozen=True)
class RopeByLayerType:
    """RoPE of layers with and without a sliding window; only the latter are scaled."""

    theta: float
    local_theta: float
    local_key: str

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Read after the windows. Raises ``ValueError`` for scaling that the decoder does not compute."""
        parameters = _parameters(stated, "rope_parameters")
        if unknown := sorted(parameters.keys() - {_FULL, _SLIDING}):
            raise ValueError(f"rope_parameters: got {unknown[0]!r}, expected {_FULL} and {_SLIDING}")
        full = _parameters(parameters, _FULL) | _parameters(stated, "rope_scaling")
        local = _parameters(parameters, _SLIDING)
        if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
            raise ValueError(f"rope_parameters.{_SLIDING}.rope_type: got {kind!r}, expected 'default'")
        own = local.get("rope_theta", stated.get(self.local_key, self.local_theta))
        return {
            "rope_theta": full.get("rope_theta", stated.get("rope_theta", self.theta)),
            "rope_scaling": read_scaling(full, stated, values),
            "rope_local_theta": own if values["sliding_window"] is not None else None,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write all keys that the versions of transformers read."""
        scaling = write_scaling(config.rope_scaling)
        local = config.rope_local_theta or self.local_theta
        return {
            self.local_key: local,
            "rope_theta": config.rope_theta,
            "rope_parameters": {
                _FULL: {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
                _SLIDING: {"rope_type": "default", "rope_theta": local},
            },
            **({"rope_scaling": scaling} if scaling else {}),
        }


def read_scaling(
    parameters: Stated, stated: Stated, values: Mapping[str, Any], *, allowed: bool = True
) -> dict[str, Any] | None:
    """Return our ``rope_scaling`` from transformers' RoPE parameters; None if they do not scale.

    Raises ``ValueError`` for another kind of scaling or an unknown parameter.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kinds = ["default", *(ROPE_KEYS if allowed else ())]
    if kind not in kinds:
        raise ValueError(f"rope_scaling.rope_type: got {kind!r}, expected one of {', '.join(kinds)}")
    if unknown := sorted(parameters.keys() - _ROPE_NAMES - RopeScalingConfig.model_fields.keys()):
        raise ValueError(f"rope_scaling.{unknown[0]}: got {parameters[unknown[0]]!r}, expected no such parameter")
    if kind == "default":
        return None
    used = ROPE_KEYS[kind] | ROPE_OPTIONAL.get(kind, frozenset())
    scaling = {name: parameters[name] for name in used if name in parameters}
    if "original_max_position_embeddings" in used:
        own = scaling.get("original_max_position_embeddings", values["max_seq_len"])
        scaling["original_max_position_embeddings"] = stated.get("original_max_position_embeddings", own)
    if kind == "yarn" and "factor" not in scaling:
        scaling["factor"] = values["max_seq_len"] / scaling["original_max_position_embeddings"]
    return {"rope_type": kind, **scaling}


def write_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any]:
    """Return transformers' RoPE parameters; empty without scaling."""
    return {} if scaling is None else scaling.model_dump(exclude_none=True)


def _parameters(stated: Stated, key: str) -> dict[str, Any]:
    """Return a table without its nulls; empty if missing. Raises ``ValueError`` if it is no table."""
    value = stated.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: got {value!r}, expected a table")
    return {name: item for name, item in value.items() if item is not None}


@dataclass(frozen=True)
class NopeLayers:
    """Layers without RoPE: transformers states for each layer whether it has it."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """By default, every ``no_rope_layer_interval``-th layer has none."""
        num_layers, interval = values["num_layers"], stated.get("no_rope_layer_interval", 4)
        if "no_rope_layers" not in stated:
            if not isinstance(interval, int) or interval < 1:
                raise ValueError(f"no_rope_layer_interval: got {interval!r}, expected a positive integer")
            return {"nope_layers": tuple(range(interval - 1, num_layers, interval))}
        flags = stated["no_rope_layers"]
        if not isinstance(flags, list) or len(flags) < num_layers:
            raise ValueError(f"no_rope_layers: got {str(flags)[:80]}, expected 0 or 1 for each of {num_layers} layers")
        return {"nope_layers": tuple(layer for layer in range(num_layers) if not flags[layer])}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write 1 for a layer with RoPE."""
        return {"no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.num_layers)]}


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
            kinds = [_SLIDING if window and self.sliding(layer, stated) else _FULL for layer in layers]
        if not isinstance(kinds, list) or len(kinds) != len(layers) or set(map(str, kinds)) - {_FULL, _SLIDING}:
            raise ValueError(
                f"layer_types: got {str(kinds)[:80]}, expected {_FULL} or {_SLIDING} for each of {len(layers)} layers"
            )
        if _SLIDING not in kinds:
            return {"sliding_window": None, "layer_types": None}
        if window is None:
            raise ValueError(f"sliding_window: got null, expected a number: layer_types has {_SLIDING}")
        return {"sliding_window": window, "layer_types": tuple(kinds) if _FULL in kinds else None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the kind of each layer."""
        windows = [config.window(layer) for layer in range(config.num_layers)]
        kinds = [_FULL if window is None else _SLIDING for window in windows]
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
        """Read after the experts. Raises ``ValueError`` for a dense layer after one with experts."""
        dense = stated.get("mlp_only_layers", [])
        if not isinstance(dense, list) or sorted(map(str, dense)) != sorted(map(str, range(len(dense)))):
            raise ValueError(f"mlp_only_layers: got {str(dense)[:80]}, expected the first layers, such as [0, 1]")
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
