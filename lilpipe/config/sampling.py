"""How completions are drawn from a model, and what every stage that samples has in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from lilpipe.config.section import NumWorkers, Section


class SamplingConfig(Section):
    """How completions are drawn from a model."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_k: NonNegativeInt = 0
    """Only this many of the likeliest tokens are drawn from (Fan et al. 2018); 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus (Holtzman et al. 2020)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Tokens of less than this share of the likeliest one's probability are not drawn (Nguyen et al. 2024)."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Logits of tokens of the prompt and the completion so far are divided by it, negative ones multiplied (Keskar et
    al. 2019)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion once its text holds one. What is learnt from is every token drawn, those of the
    string too, and no end of the turn behind them."""
    keep_stop: bool = False
    """Whether the string that ended a completion stays in its text, as a closing tag must; else the text ends before
    it, as where the string begins what is no more of the completion."""
    max_new_tokens: PositiveInt = 48
    """Longest completion."""
    batch_size: PositiveInt = 256
    """Sequences decoded together."""
    engine: Literal["native", "vllm"] = "native"
    """`vllm` is experimental: it has been tested with a stand-in only. It needs the extra `vllm` and a GPU, and samples
    other completions than the native engine."""
    cuda_graphs: bool = False
    """Experimental: replay the decode step of the native engine as CUDA graphs. It has never been run on a GPU."""

    @model_validator(mode="after")
    def _something_is_kept(self) -> SamplingConfig:
        if self.keep_stop and not self.stop:
            raise ValueError("keep_stop is true, but stop names no string; name one, or remove keep_stop")
        return self


class SamplingSection(Section):
    """What every stage that samples from a model has in common."""

    seed: int | None = None
    """Seed of sampling; the pipeline's `seed` where none is given."""
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_chunk: PositiveInt = 100
    """Prompts between two points from which a killed run continues."""
    num_workers: NumWorkers = 1
    """Processes that sample; the chunks are divided among them and do not depend on their number."""
    threads_per_worker: PositiveInt = 1
    """Threads of a process."""
