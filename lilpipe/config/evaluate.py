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
    """A language model that says which of two answers is better, asked by OpenAI's protocol (Ollama, vLLM, ...)."""

    address: Annotated[str, Operational] = "http://127.0.0.1:11434/v1"
    """Where it answers, up to and without `/chat/completions`; by default where Ollama listens."""
    model: str = ""
    """Its name at that address."""
    template: str = JUDGE_TEMPLATE
    """What it is asked, with `{question}`, `{first}` and `{second}`; it must end in `[[A]]`, `[[B]]` or `[[C]]`."""
    max_new_tokens: PositiveInt = 512
    """Longest reply. A reply that was cut off has no verdict."""
    num_prompts: PositiveInt = 100
    """Prompts whose answers are judged: the first of the split."""
    games_per_prompt: PositiveInt = 1
    """Games of each model at each prompt, of two requests each."""
    api_key_variable: Annotated[str | None, Operational] = None
    """Environment variable that holds the key, where one is needed; the key itself is written nowhere."""
    concurrency: Annotated[PositiveInt, Operational] = 4
    """Requests under way at once, all workers together (each has one at least)."""
    timeout_seconds: Annotated[PositiveFloat, Operational] = 120.0
    """Longest time for one request."""
    max_retries: Annotated[NonNegativeInt, Operational] = 5
    """Further tries of a request whose address cannot be reached or is busy, each after twice the time."""

    @field_validator("template")
    @classmethod
    def _names_what_it_compares(cls, template: str) -> str:
        marks = {"question": "<q>", "first": "<a>", "second": "<b>"}
        try:
            shown = template.format(**marks)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"cannot be filled in ({error!r}); write a brace that is text as {{{{ or }}}}") from error
        if missing := [name for name, mark in marks.items() if mark not in shown]:
            raise ValueError(f"lacks {', '.join(f'{{{name}}}' for name in missing)}")
        return template


class EvaluateConfig(SamplingSection):
    """How good the model is after each training stage."""

    split: Literal["test", "validation"] = "test"
    """Prompts to report on; choose hyperparameters on `validation`."""
    num_generations: PositiveInt = 8
    """Samples behind pass@k."""
    validation_rows: PositiveInt = 200
    """Rows of validation text behind bits per byte."""
    rewards: RewardConfigs = ANSWER_REWARD
    """What is measured of each sampled answer, each apart; an input `reward_model` adds its score."""
    win_against: Literal["model", "answer"] = "model"
    """Whom each chat model's answers are set against: the `model` of the input `reference`, or the reference `answer`
    that comes with a prompt (prompts without one are left out)."""
    win_by: Literal["brevity", "reward_model", "judge"] = "brevity"
    """Who says which of two answers wins: a fixed rule (well-formed first, then the fewer words), the higher score of
    the input `reward_model`, or the language model of `judge`."""
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _judge_has_a_name(self) -> EvaluateConfig:
        if self.win_by == "judge" and not self.judge.model:
            raise ValueError("win_by is 'judge', but judge.model is empty; name the model that judges")
        return self


class RegisterConfig(Section):
    """The final model in Hugging Face layout, and its name in the MLflow registry."""

    model_name: Annotated[str, Operational] = "lilpipe"
    """Registered model's name."""
    alias: Annotated[str, Operational] = "champion"
    """Alias given to the new version."""
