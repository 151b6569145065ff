"""A family of models as a row of data: the class of ``transformers``, and how its settings and tensors are stated.

A row maps our settings to the keys of ``config.json``. Settings that are stated in several keys, such as RoPE and
sliding windows, are ``Part``s. What all models of a family share is in ``lilpipe.config.families``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from lilpipe.config.families import Family as FamilyName
from lilpipe.config.model import ModelConfig

Stated = Mapping[str, Any]
"""Content of a ``config.json``."""
Tensors = dict[str, Tensor]
"""Tensors of one layer, or those outside the layers."""
MAX_LAYERS = 10_000
MAX_POSITIONS = 2**24
"""More layers and positions than any model has: a wrong number would take hours or all memory."""


class UnsupportedError(ValueError):
    """A setting that the decoder does not compute; a class of transformers may."""


class Part(Protocol):
    """Settings that are stated in several keys."""

    def read(self, stated: Stated, values: dict[str, Any]) -> dict[str, Any]:
        """Return our settings; ``values`` are those of the plain keys. Raises ``ValueError`` naming a key."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of ``config.json``."""
        ...


def unchanged(tensors: Tensors, config: ModelConfig, stated: Stated) -> Tensors:  # noqa: ARG001
    """Return the tensors, whose names and shapes are the decoder's."""
    return tensors


def unchanged_back(tensors: Tensors, config: ModelConfig) -> Tensors:  # noqa: ARG001
    """Return the tensors."""
    return tensors


def any_model(config: ModelConfig) -> bool:  # noqa: ARG001
    """Accept every model."""
    return True


@dataclass(frozen=True)
class Family:
    """One class of ``transformers``: conversion of its config and tensors to ours and back."""

    model_type: FamilyName
    class_name: str
    keys: Mapping[str, str]
    """Our settings to theirs."""
    parts: tuple[Part, ...] = ()
    """Further settings."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Required values of their settings."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Required values of their settings that are not written."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written, and not read."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the class for keys missing in ``config.json``. Fixed keys without a default may be missing."""
    from_hf: Callable[[Tensors, ModelConfig, Stated], Tensors] = unchanged
    """Rename and convert tensors from the files to the decoder's."""
    to_hf: Callable[[Tensors, ModelConfig], Tensors] = unchanged_back
    """Invert ``from_hf``."""
    accepts: Callable[[ModelConfig], bool] = any_model
    """Whether the class computes a model whose settings it can state."""

    def computes(self, config: ModelConfig) -> bool:
        """Return whether the class computes the same as a decoder with this config: it states all of its settings."""
        if not self.accepts(config):
            return False
        try:
            return _relevant(ModelConfig(**self.read(self.write(config)))) == _relevant(config)
        except (ValidationError, ValueError):
            return False

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the class's keys of ``config.json``."""
        stated = {
            **self.constants,
            **self.fixed,
            **{theirs: getattr(config, ours) for ours, theirs in self.keys.items()},
        }
        for part in self.parts:
            stated |= part.write(config)
        if config.dropout and "dropout" not in self.keys:
            stated["dropout"] = config.dropout  # read by later stages only; transformers has no such dropout
        return stated

    def read(self, stated: Stated) -> dict[str, Any]:
        """Return the values of a ``ModelConfig``. Raises ``ValueError`` naming a missing or wrong key,
        ``UnsupportedError`` one that the decoder does not compute.
        """
        for key, value in {**self.fixed, **self.expected}.items():
            if (got := stated.get(key, self.defaults.get(key, value))) != value:
                raise UnsupportedError(f"{key}: got {got!r}, expected {value!r}")
        every_head = {"num_key_value_heads": stated.get("num_attention_heads")}
        stated = {**every_head, **self.defaults, **stated}
        if stated["num_key_value_heads"] is None:
            stated |= every_head
        values = {"architecture": self.model_type, **read_keys(stated, self.keys)}
        check_size("number of layers", values["num_layers"], MAX_LAYERS)
        check_size("number of positions", values["max_seq_len"], MAX_POSITIONS)
        for part in self.parts:
            values |= part.read(stated, values)
        if "dropout" in stated and "dropout" not in self.keys:
            values["dropout"] = stated["dropout"]
        return values


def read_keys(stated: Stated, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of ``keys``, by our names. Raises ``ValueError`` for a missing key."""
    if missing := [theirs for theirs in keys.values() if theirs not in stated]:
        raise ValueError(f"{missing[0]}: missing")
    return {ours: stated[theirs] for ours, theirs in keys.items()}


def check_size(name: str, value: Any, most: int) -> None:
    """Raise ``ValueError`` for a number that no model has."""
    if not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{name}: got {value!r}, expected 1 to {most:,}")


def _relevant(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that the model's function depends on, and those of its training."""
    values = config.model_dump(exclude={"architecture"})
    values["head_dim"] = config.head_size if config.mla is None else None
    values["query_pre_attn_scalar"] = config.query_pre_attn_scalar or values["head_dim"]
    values["windows"] = [config.window(layer) for layer in range(config.num_layers)]
    del values["layer_types"]
    if config.mla is not None:
        del values["num_kv_heads"]
    if config.position_embedding == "learned":
        del values["rope_theta"]
    if config.first_moe_layer == 0:
        del values["intermediate_size"]
    return values
