"""Config of a model that a class of transformers computes, instead of the decoder."""

from __future__ import annotations

from typing import Any

from lilpipe.config.model import ModelConfig


class BackendConfig(ModelConfig):
    """A model that a class of transformers computes (``lilpipe.model.backend``).

    Only the sizes that stages need are set: those of the hidden states, layers, context and tied embeddings, and the
    soft cap of the logits. The position embedding counts as learned: nothing is known about it.
    """

    stated: dict[str, Any]
    """Content of ``config.json``."""
    reason: str = ""
    """Setting that the decoder does not compute; empty if it lacks the architecture."""
    class_name: str
    """Class in transformers."""
    num_parameters: int
    """Number of all parameters."""
    duplicates: tuple[str, ...] = ()
    """Names of tensors that share their memory with another."""
    embeddings: tuple[str, ...] = ()
    """Names of tensors with a row per token."""
