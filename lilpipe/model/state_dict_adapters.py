"""The class of ``transformers`` as which a model is written, and the layout of models that no class computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lilpipe.config.model import ModelConfig
from lilpipe.model.families import FAMILIES
from lilpipe.model.family import Family, Stated


class Lilpipe:
    """Models that no class of ``transformers`` computes, for example with a soft cap of a Llama's logits.

    Their files have the decoder's own names, and only this package reads them.
    """

    model_type = "lilpipe"
    class_name = "Transformer"

    def computes(self, config: ModelConfig) -> bool:  # noqa: ARG002
        """All models."""
        return True

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Write the config as it is."""
        return {"model": config.model_dump(mode="json")}

    def read(self, stated: Stated) -> dict[str, Any]:
        """Read the config as it is. Raises ``ValueError`` if it is missing."""
        if not isinstance(stated.get("model"), dict):
            raise ValueError("model: missing")
        return stated["model"]

    def from_hf(self, tensors: dict[str, Tensor], config: ModelConfig, stated: Stated) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors."""
        return tensors

    def to_hf(self, tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors."""
        return tensors


StateDictAdapter = Family | Lilpipe
LAYOUTS: tuple[StateDictAdapter, ...] = (*FAMILIES, Lilpipe())


def adapter_for(config: ModelConfig) -> StateDictAdapter:
    """Return the layout of a model: of its own family if that computes it, otherwise the first that does."""
    own = [layout for layout in FAMILIES if layout.model_type == config.architecture]
    return next(layout for layout in (*own, *LAYOUTS) if layout.computes(config))
