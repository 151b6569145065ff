"""The class of ``transformers`` as which a model is written, and the layout of models that no class computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.model.backend import published_tensors
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


class Verbatim:
    """Models that a class of transformers computes (``lilpipe.model.backend``): the files are that class's."""

    def __init__(self, config: BackendConfig) -> None:
        self.model_type: str = config.stated["model_type"]
        self.class_name = config.class_name

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the content of ``config.json`` as it came."""
        assert isinstance(config, BackendConfig)
        return config.stated

    def to_hf(self, tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Return the tensors by their names in a published checkpoint."""
        assert isinstance(config, BackendConfig)
        return published_tensors(tensors, config)


StateDictAdapter = Family | Lilpipe
LAYOUTS: tuple[StateDictAdapter, ...] = (*FAMILIES, Lilpipe())


def adapter_for(config: ModelConfig) -> StateDictAdapter | Verbatim:
    """Return the layout of a model: of its own family if that computes it, otherwise the first that does."""
    if isinstance(config, BackendConfig):
        return Verbatim(config)
    own = [layout for layout in FAMILIES if layout.model_type == config.architecture]
    return next(layout for layout in (*own, *LAYOUTS) if layout.computes(config))
