"""Section of stage ``release``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lilpipe.config.section import Operational, Section

GGUFType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"]
KQuant = Literal["Q4_K_M", "Q5_K_M", "Q6_K"]


class HubConfig(Section):
    """Upload of the release to the Hugging Face hub."""

    repo_id: str = ""
    """Repository, such as `my-team/my-model`; empty uploads nothing."""
    private: bool = True
    """Create the repository as private."""
    revision: str = "main"
    """Branch to commit to; it is created if it does not exist."""
    token_variable: Annotated[str, Operational] = "HF_TOKEN"
    """Environment variable with the access token; the token itself is never written."""
    endpoint: Annotated[str | None, Operational] = None
    """Address of the hub; None is huggingface.co, or `HF_ENDPOINT` if that is set."""


class ReleaseConfig(Section):
    """The final model as a directory that other tools load, and an upload to the hub."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "model"
    """Name of the model in the card and in GGUF files."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the released weights."""
    gguf: tuple[GGUFType | KQuant, ...] = ()
    """Types of the GGUF files for llama.cpp and Ollama (extra `gguf`). Q4_K_M, Q5_K_M and Q6_K are quantized by
    llama.cpp (package `llama-cpp-python`)."""
    adapter_of: str = ""
    """Hub name or path of the base model, to release the adapter of the last step alone, in peft's format: without the
    weights, and with this name as its base. If empty, the weights are released, and the adapter in the folder
    `adapter`."""
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _an_adapter_has_no_gguf(self) -> ReleaseConfig:
        if self.adapter_of and self.gguf:
            raise ValueError("adapter_of: an adapter alone has no weights for gguf; set one of them")
        return self
