"""Sections of prompts, and of the rewards of their completions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lilpipe.config.section import Address, BuiltIn, Extensible, Ratio, Section, WithOptions


class PromptColumns(Section):
    """Column names (JSON keys) of a source.

    - `gsm8k`: `question`, `answer`.
    - `instructions`: `messages`; or `conversations` (ShareGPT); or `instruction`, optional `input` and `history`, and
      `output` (Alpaca); or `prompt` and `completion` or `response`, texts or lists of messages. All of them with
      optional `system` and `tools`.
    - `programs`: `prompt`, `tests` and optional `response`.
    - `preferences`: `chosen`, `rejected` and optional `edited`, with `prompt` or `instruction` and optional `input`.
      Completions and prompt may be lists of messages, and the prompt may be the beginning that the completions share.
      Or `completion` and `label`: one completion, and whether it is desirable (TRL's unpaired preferences).
    - `auto`: any of these; or `question` and `answer` without a number; or `text`.
    """

    question: str = "question"
    answer: str = "answer"
    messages: str = "messages"
    conversations: str = "conversations"
    system: str = "system"
    tools: str = "tools"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    history: str = "history"
    prompt: str = "prompt"
    response: str = "response"
    tests: str = "tests"
    chosen: str = "chosen"
    rejected: str = "rejected"
    edited: str = "edited"
    completion: str = "completion"
    label: str = "label"
    text: str = "text"


class PromptSource(Section):
    """A data set of questions with answers, from files or from the Hugging Face hub.

    The hash of a question decides its split, the same for all sources: first the fraction for `test`, then
    `validation`, documents, demonstrations; the rest are `train` prompts. Rows of `preferences` also give pairs or
    unpaired completions: those of `train` for training, those of `validation` for validation. Conversations of several
    turns cannot be prompts: with `kind` `auto` they are demonstrations unless they ask a held-out question, with other
    kinds they are left out if their first question falls into `test` or `validation`.
    """

    kind: Literal["auto", "gsm8k", "instructions", "programs", "preferences"] = "auto"
    """`auto`: the format of each row is recognised by its columns, and the log shows the number of rows of each.
    `gsm8k`: grade school mathematics (Cobbe et al. 2021), whose answers end with `#### N`. `instructions`:
    instructions with a response, or conversations. `programs`: instructions with Python tests. `preferences`: a chosen
    and a rejected completion, optionally an edited one that is better than both; or one completion labelled desirable
    or not."""
    name: str = ""
    """Name of the source: the family of its prompts, and part of their ids. If empty, that of the file or data set."""
    path: Annotated[str | None, Address] = None
    """File, folder, glob or fsspec URL: JSON Lines, one JSON list, CSV or TSV (plain or compressed), or Parquet; or a
    folder written by `save_to_disk` of `datasets`."""
    test_path: Annotated[str | None, Address] = None
    """File of the official test split; all of its rows get the split `test`."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, or a local folder of one; instead of `path`."""
    subset: str | None = None
    """Configuration of the data set (`hub` only)."""
    split: str = "train"
    """Split to read (`hub` only)."""
    test_split: str | None = None
    """Name of the official test split (`hub` only)."""
    revision: str | None = None
    """Commit of the data set (`hub` only); if None, the latest."""
    columns: PromptColumns = PromptColumns()
    test_ratio: Ratio | None = None
    """Fraction of the questions in the split `test`. If None: 0.1, or 0 if there is an official test split."""
    validation_ratio: Ratio = 0.1
    """Fraction of the questions in the split `validation`."""
    documents_ratio: Ratio = 0.0
    """Fraction of the questions that become pretraining text, with their answers."""
    demonstrations_ratio: Ratio | None = None
    """Fraction of the questions that are demonstrations for supervised fine-tuning, with their answers. If None: 0.4;
    with `kind` `auto` 0.4 of the rows that a program can verify, none of the preferences, and all others."""
    max_rows: PositiveInt | None = None
    """Maximum number of rows to read from `path` or `split`; if None, all."""
    max_malformed_ratio: Ratio = 0.01
    """Maximum fraction of malformed rows. Such rows are quarantined and counted; above this fraction of the source's
    rows, the stage fails."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"path": values}
        place = values.get("path") or values.get("hub") if isinstance(values, dict) else None
        if isinstance(place, str) and not values.get("name"):
            parts = [part for part in place.split("/") if part.strip(".") and not any(sign in part for sign in "*?[")]
            values = values | {"name": parts[-1].lstrip(".").split(".")[0] if parts else "data"}
        return values

    @model_validator(mode="after")
    def _has_one_place(self) -> PromptSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source {self.name!r}: set exactly one of path and hub")
        of_hub = ("subset", "test_split", "revision")
        ignored = [name for name in (of_hub if self.hub is None else ("test_path",)) if getattr(self, name) is not None]
        if ignored or (self.hub is None and self.split != "train"):
            place = "path" if self.hub is None else "hub"
            raise ValueError(
                f"source {self.name!r}: {', '.join(ignored) or 'split'} is not used with `{place}`; remove it"
            )
        return self

    @model_validator(mode="after")
    def _revision_is_fixed(self) -> PromptSource:
        if self.revision is not None and not re.fullmatch("[0-9a-f]{7,40}", self.revision):
            raise ValueError(
                f"source {self.name!r}: revision {self.revision!r} is not a commit hash (7 to 40 hexadecimal digits); "
                "a branch or tag may change without a rerun of the stage"
            )
        return self

    @model_validator(mode="after")
    def _shares_leave_room(self) -> PromptSource:
        if self.has_official_test and self.test_ratio:
            raise ValueError(f"source {self.name!r}: test_ratio is not used with an official test split; remove it")
        total = sum(self.shares.values())
        if total > 1 + 1e-9:
            raise ValueError(f"source {self.name!r}: the ratios sum to {total:g}, expected at most 1")
        return self

    @property
    def has_official_test(self) -> bool:
        """Whether the source has an official test split."""
        return self.test_path is not None or self.test_split is not None

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of each split, in order; the rest is `train`."""
        default = 0.0 if self.has_official_test else 0.1
        return {
            "test": default if self.test_ratio is None else self.test_ratio,
            "validation": self.validation_ratio,
            "documents": self.documents_ratio,
            "demonstrations": self._demonstrations_ratio,
        }

    @property
    def _demonstrations_ratio(self) -> float:
        if self.demonstrations_ratio is None:
            return 0.0 if self.kind == "auto" else 0.4  # `auto` decides row by row
        return self.demonstrations_ratio


FAMILY_NAMES = (
    "copy", "reverse", "sort", "largest", "first_word", "last_word", "count", "addition", "subtraction", "compare",
    "multiplication", "remainder", "base", "expression",
)  # fmt: skip


class PromptsConfig(Extensible):
    """Prompts with answers from generated task families that a program can verify, and from data sets; split once for
    the whole pipeline.
    """

    seed: int = 0
    """Seed of the generated tasks."""
    families: Annotated[tuple[str, ...], BuiltIn("question family", FAMILY_NAMES)] = ("copy", "reverse", "sort")
    """Task families: those of `lilpipe.alignment.questions.families`, or custom families."""
    difficulty: dict[str, tuple[PositiveInt, PositiveInt]] = {}
    """Minimum and maximum difficulty of a family, in its unit (items, digits, operations); families that are not named
    use their default. Pretraining exercises exclude the hardest level."""
    sources: tuple[PromptSource, ...] = ()
    """Data sets in addition to the generated tasks: tables of settings, or paths."""
    num_documents: NonNegativeInt = 20_000
    """Number of exercises as plain text for pretraining."""
    num_demonstrations: NonNegativeInt = 1_000
    """Number of prompts with a written answer for supervised fine-tuning."""
    num_train: PositiveInt = 4_000
    """Number of prompts without an answer for rejection sampling, DPO and GRPO."""
    num_validation: PositiveInt = 300
    """Number of validation prompts, for choosing hyperparameters."""
    num_test: PositiveInt = 500
    """Number of test prompts, which only `evaluate` reads."""
    filler_ratio: Ratio = 0.75
    """Fraction of written answers, in exercises and demonstrations, that start with polite filler sentences."""
    max_filler_sentences: Annotated[int, Field(ge=0, le=8)] = 3
    """Maximum number of filler sentences before an answer."""

    @model_validator(mode="after")
    def _difficulty_is_of_families(self) -> PromptsConfig:
        for family, (least, most) in self.difficulty.items():
            if family not in self.families:
                raise ValueError(
                    f"prompts.difficulty: {family!r} is not one of prompts.families: {list(self.families)}"
                )
            if least > most:
                raise ValueError(f"prompts.difficulty.{family}: got ({least}, {most}), expected (min, max)")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> PromptsConfig:
        names = [*self.families, *(source.name for source in self.sources)]
        if len(set(names)) != len(names):
            raise ValueError(f"prompts: names of families and sources must be unique, got {names}")
        return self


RewardKind = Literal["answer", "numeric", "format", "regex", "length", "language", "reward_model", "program"]

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "answer": (),
    "numeric": ("marker", "tolerance"),
    "format": ("template",),
    "regex": ("pattern",),
    "length": ("target_tokens", "limit_tokens", "buffer_tokens"),
    "language": ("language",),
    "reward_model": (),
    "program": ("timeout_seconds", "memory_mib"),
}
"""Options of each kind of reward; an option of another kind is an error because it would be ignored."""

_NEEDED: Mapping[str, tuple[str, ...]] = {"regex": ("pattern",)}


class RewardConfig(WithOptions):
    """A reward function; the reward of a completion is the weighted sum of a stage's reward functions."""

    kind: Annotated[str, BuiltIn("reward", get_args(RewardKind))]
    """`answer`: 1 if the prompt's verifier accepts the completion. `numeric`: 1 if it contains the number of the
    reference answer. `format`: 1 if it matches `template`. `regex`: 1 if it contains a match of `pattern`. `length`:
    highest near `target_tokens`, or a penalty above `limit_tokens`. `language`: the probability of `language`.
    `reward_model`: the score of the stage's input `reward_model`. `program`: 1 if its code passes the prompt's tests.
    Or a custom reward."""
    weight: float = 1.0
    """Weight of this reward in the sum; negative for a penalty."""
    name: str | None = None
    """Name in logs and tables; if None, the kind."""
    marker: str | None = None
    """Text before the number (`numeric`), such as `####`; if None, the last number of the completion counts."""
    tolerance: NonNegativeFloat | None = None
    """Maximum absolute difference from the correct number (`numeric`); if None, 0."""
    template: Literal["answer", "think"] | None = None
    """Format of a completion (`format`). `answer`: optional filler or steps, then `Answer: X` (the default). `think`:
    `<think>..</think><answer>..</answer>` (DeepSeek-R1)."""
    pattern: str | None = None
    """Regular expression (`regex`) in Python syntax; `.` also matches a newline."""
    target_tokens: PositiveInt | None = None
    """Target length (`length`): reward 1 at this length, decreasing to 0 at zero tokens and at twice the target."""
    limit_tokens: PositiveInt | None = None
    """Maximum length (`length`): reward -1 from this length on (soft overlong punishment, DAPO, Yu et al. 2025)."""
    buffer_tokens: PositiveInt | None = None
    """Number of tokens before `limit_tokens` over which the penalty grows from 0; if None, a fifth of
    `limit_tokens`."""
    language: str | None = None
    """Code of the target language (`language`), such as `en`; if None, `en`."""
    timeout_seconds: PositiveFloat | None = None
    """Time limit of a program (`program`), for wall time and CPU time; if None, 5."""
    memory_mib: PositiveInt | None = None
    """Address space limit of a program (`program`); if None, 256."""

    @model_validator(mode="after")
    def _options_match_kind(self) -> RewardConfig:
        options = _OPTIONS.get(self.kind, ())
        allowed = {"kind", "weight", "name", "file", "options", *options}
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if unused := sorted(given - allowed):
            expected = ", ".join(options) or "none"
            raise ValueError(
                f"reward of kind {self.kind!r}: got options {', '.join(unused)}, which it does not use (its options: "
                f"{expected}); remove them"
            )
        if self.pattern is not None:
            _check_pattern(self.pattern)
        if missing := [name for name in _NEEDED.get(self.kind, ()) if name not in given]:
            raise ValueError(f"reward of kind {self.kind!r}: needs {' and '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _length_has_one_aim(self) -> RewardConfig:
        if self.kind == "length" and (self.target_tokens is None) == (self.limit_tokens is None):
            raise ValueError("reward of kind 'length': set exactly one of target_tokens and limit_tokens")
        if self.buffer_tokens is not None and self.buffer_tokens > (self.limit_tokens or 0):
            raise ValueError(
                f"reward of kind 'length': buffer_tokens {self.buffer_tokens} must be at most limit_tokens "
                f"{self.limit_tokens}"
            )
        return self

    @property
    def label(self) -> str:
        """Name in logs and tables."""
        return self.name or self.kind


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"reward of kind 'regex': pattern {pattern!r} is not a valid regular expression: {error}"
        ) from error


def _names_differ(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    names = [reward.label for reward in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards: names must be unique, got {names}; set `name`")
    return rewards


RewardConfigs = Annotated[tuple[RewardConfig, ...], Field(min_length=1), AfterValidator(_names_differ)]
"""Reward functions of a stage. ``(RewardConfig(kind="answer"),)`` gives 1 to a completion that is correct and not
truncated."""

ANSWER_REWARD: tuple[RewardConfig, ...] = (RewardConfig(kind="answer"),)
"""Default of all stages except PPO."""
