"""Sections of evaluation and registration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from lilpipe.config.prompts import ANSWER_REWARD, RewardConfigs
from lilpipe.config.sampling import SamplingSection
from lilpipe.config.section import Operational, Section

JUDGE_TEMPLATE = """\
Two assistants answered the same question. Say which answer is better: the one that is right, and of two right ones \
the one that says it more plainly. Neither length nor the order in which the answers stand counts for anything.

Question:
{question}

Answer A:
{first}

Answer B:
{second}

Give your reason in one sentence. Then end with exactly one of these, on a line of its own: [[A]] if answer A is \
better, [[B]] if answer B is better, [[C]] if neither is.
"""


class JudgeConfig(Section):
    """LLM judge that compares two completions, reached by an OpenAI-compatible API (Ollama, vLLM, ...)."""

    address: Annotated[str, Operational] = "http://127.0.0.1:11434/v1"
    """Base URL of the API, without `/chat/completions`; the default is Ollama's."""
    model: str = ""
    """Name of the model at that URL."""
    template: str = JUDGE_TEMPLATE
    """Prompt template with `{question}`, `{first}` and `{second}`; it must ask for a reply that ends in `[[A]]`,
    `[[B]]` or `[[C]]`."""
    max_new_tokens: PositiveInt = 512
    """Maximum number of tokens of a reply. A truncated reply has no verdict."""
    num_prompts: PositiveInt = 100
    """Number of prompts whose completions are judged: the first of the split."""
    games_per_prompt: PositiveInt = 1
    """Comparisons per model and prompt, of two requests each (one for each order of the completions)."""
    api_key_variable: Annotated[str | None, Operational] = None
    """Environment variable with the API key, if the API needs one; the key itself is never written."""
    concurrency: Annotated[PositiveInt, Operational] = 4
    """Maximum number of concurrent requests over all workers (at least one per worker)."""
    timeout_seconds: Annotated[PositiveFloat, Operational] = 120.0
    """Timeout of a request."""
    max_retries: Annotated[NonNegativeInt, Operational] = 5
    """Maximum number of retries if the server is unreachable or busy, with exponential backoff."""

    @field_validator("template")
    @classmethod
    def _names_what_it_compares(cls, template: str) -> str:
        marks = {"question": "<q>", "first": "<a>", "second": "<b>"}
        try:
            shown = template.format(**marks)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"cannot be formatted ({error!r}); write literal braces as {{{{ and }}}}") from error
        if missing := [name for name, mark in marks.items() if mark not in shown]:
            raise ValueError(f"has no placeholder {', '.join(f'{{{name}}}' for name in missing)}")
        return template


class EvaluateConfig(SamplingSection):
    """Evaluation of the model of each training stage."""

    split: Literal["test", "validation"] = "test"
    """Split to report on; choose hyperparameters on `validation`."""
    num_generations: PositiveInt = 8
    """Completions per prompt, for pass@k."""
    validation_rows: PositiveInt = 200
    """Number of validation rows for bits per byte."""
    rewards: RewardConfigs = ANSWER_REWARD
    """Reward functions to measure on each completion, reported separately; an input `reward_model` adds its score."""
    win_against: Literal["model", "answer"] = "model"
    """Baseline of the win rate of each chat model: the `model` of the input `reference`, or the reference `answer` of a
    prompt (prompts without one are skipped)."""
    win_by: Literal["none", "brevity", "reward_model", "judge"] = "brevity"
    """How the better of two completions is decided: `none` compares none, `brevity` is a fixed rule (well-formed
    first, then fewer words), `reward_model` the higher score of the input `reward_model`, `judge` the LLM judge."""
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _judge_has_a_name(self) -> EvaluateConfig:
        if self.win_by == "judge" and not self.judge.model:
            raise ValueError("win_by is 'judge', but judge.model is empty; set it to the judge's model name")
        return self


class RegisterConfig(Section):
    """The final model in Hugging Face format, and its name in the MLflow model registry."""

    model_name: Annotated[str, Operational] = "lilpipe"
    """Name of the registered model."""
    alias: Annotated[str, Operational] = "champion"
    """Alias of the new version."""
