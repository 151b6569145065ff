"""How ``config.json`` states positions: RoPE's bases, scaling and rotated fraction, and layers without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lilpipe.config.model import ROPE_KEYS, ROPE_OPTIONAL, ModelConfig, RopeScalingConfig
from lilpipe.model.family import Stated, UnsupportedError
from lilpipe.model.family_parts import FULL, SLIDING

_ROPE_NAMES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


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
        """Raise ``UnsupportedError`` for scaling that the decoder does not compute."""
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
        """Read after the windows. Raises ``UnsupportedError`` for scaling that the decoder does not compute."""
        parameters = _parameters(stated, "rope_parameters")
        if unknown := sorted(parameters.keys() - {FULL, SLIDING}):
            raise ValueError(f"rope_parameters: got {unknown[0]!r}, expected {FULL} and {SLIDING}")
        full = _parameters(parameters, FULL) | _parameters(stated, "rope_scaling")
        local = _parameters(parameters, SLIDING)
        if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
            raise UnsupportedError(f"rope_parameters.{SLIDING}.rope_type: got {kind!r}, expected 'default'")
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
                FULL: {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
                SLIDING: {"rope_type": "default", "rope_theta": local},
            },
            **({"rope_scaling": scaling} if scaling else {}),
        }


def read_scaling(
    parameters: Stated, stated: Stated, values: Mapping[str, Any], *, allowed: bool = True
) -> dict[str, Any] | None:
    """Return our ``rope_scaling`` from transformers' RoPE parameters; None if they do not scale.

    Raises ``UnsupportedError`` for another kind of scaling, ``ValueError`` for an unknown parameter, which classes of
    transformers ignore.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kinds = ["default", *(ROPE_KEYS if allowed else ())]
    if kind not in kinds:
        raise UnsupportedError(f"rope_scaling.rope_type: got {kind!r}, expected one of {', '.join(kinds)}")
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
