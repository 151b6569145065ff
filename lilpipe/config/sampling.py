"""Sampling of completions from a model, and settings shared by all stages that sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import NumWorkers, Section


class SamplingConfig(Section):
    """Sampling parameters."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_k: NonNegativeInt = 0
    """Sample only from this many most likely tokens (Fan et al. 2018); 0 disables it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this cumulative probability (Holtzman et al. 2020);
    1 disables it."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Minimum probability of a token, relative to the most likely token (Nguyen et al. 2024); 0 disables it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Penalty on tokens that occur in the prompt or the completion so far: positive logits are divided by it, negative
    ones multiplied (Keskar et al. 2019); 1 disables it."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion. Training uses every sampled token, including those of the stop string, and adds no
    end-of-turn token."""
    keep_stop: bool = False
    """Keep the stop string in the text of the completion, e.g. a closing tag. Otherwise the text ends before it."""
    max_new_tokens: PositiveInt = 48
    """Maximum number of tokens of a completion."""
    batch_size: PositiveInt = 256
    """Sequences decoded together."""
    engine: Literal["native", "vllm"] = "native"
    """Inference engine. `vllm` is experimental: tested only with a fake of vLLM. It needs the extra `vllm` and a GPU;
    its samples differ from those of `native`."""
    cuda_graphs: bool = False
    """Experimental: replay the decode step of the native engine as CUDA graphs. Never run on a GPU."""

    @model_validator(mode="after")
    def _something_is_kept(self) -> SamplingConfig:
        if self.keep_stop and not self.stop:
            raise ValueError("keep_stop is true, but stop is empty; add a stop string, or remove keep_stop")
        return self


class SamplingSection(Section):
    """Settings shared by all stages that sample from a model."""

    seed: int | None = None
    """Sampling seed; if None, the pipeline's `seed`."""
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_chunk: PositiveInt = 100
    """Prompts per chunk. A killed run resumes after the last complete chunk."""
    num_workers: NumWorkers = 1
    """Number of sampling processes. Chunks are divided among them and do not depend on their number."""
    threads_per_worker: PositiveInt = 1
    """CPU threads per process."""
