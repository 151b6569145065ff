"""Section of the prompts and of the rewards of answers to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lilpipe.config.section import BuiltIn, Extensible, Ratio, Section, WithOptions


class PromptColumns(Section):
    """Which key of a source's rows holds what.

    - `gsm8k`: `question`, `answer`.
    - `instructions`: `messages`; or `instruction`, maybe `input`, `output`; or `prompt`, `response`.
    - `programs`: `prompt`, `tests` and maybe `response`.
    - `preferences`: `chosen`, `rejected` and maybe `edited`, to `prompt` or `instruction` with maybe `input`. Answers
      and prompt may be lists of messages, and the prompt may stand in the answers' messages alone. Or `completion`
      and `label`: one answer, and whether it is desirable (TRL's unpaired preferences).
    """

    question: str = "question"
    answer: str = "answer"
    messages: str = "messages"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    prompt: str = "prompt"
    response: str = "response"
    tests: str = "tests"
    chosen: str = "chosen"
    rejected: str = "rejected"
    edited: str = "edited"
    completion: str = "completion"
    label: str = "label"


class PromptSource(Section):
    """A data set of questions with answers, from files or from the Hugging Face hub.

    What becomes of a row is decided by the hash of its question, the same for every source: first the share for `test`,
    then `validation`, documents, demonstrations; the rest are `train` prompts. Rows of `preferences` give pairs or
    unpaired completions too: those of `train` to learn from, those of `validation` held out.
    """

    kind: Literal["gsm8k", "instructions", "programs", "preferences"]
    """`gsm8k`: grade school mathematics (Cobbe et al. 2021), whose answers end in `#### N`. `instructions`: an answer
    for each instruction, or conversations. `programs`: tests in Python for each instruction. `preferences`: a chosen
    and a rejected answer, maybe one that is better than both; or one answer that is desirable or not."""
    name: str
    """The name that its prompts carry in ids, and their family."""
    path: str | None = None
    """File, folder, glob or fsspec URL of JSON lines, or of one JSON list; plain or compressed."""
    test_path: str | None = None
    """The official test split: all of it is `test`."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, or a local folder of one, instead of `path`."""
    subset: str | None = None
    """Configuration of the data set (`hub` only)."""
    split: str = "train"
    """Split to read (`hub` only)."""
    test_split: str | None = None
    """The official test split (`hub` only)."""
    revision: str | None = None
    """Commit of the data set (`hub` only); the newest where none is given."""
    columns: PromptColumns = PromptColumns()
    test_ratio: Ratio | None = None
    """Share of the questions for the split `test`; 0.1, or none with an official test split, where none is given."""
    validation_ratio: Ratio = 0.1
    """Share of the questions for the split `validation`."""
    documents_ratio: Ratio = 0.0
    """Share of the questions that become text for pretraining, with their answers."""
    demonstrations_ratio: Ratio = 0.4
    """Share of the questions that are shown with their answers in supervised fine-tuning."""
    max_rows: PositiveInt | None = None
    """Read so many rows of `path` or `split`."""
    max_malformed_ratio: Ratio = 0.01
    """Rows that are none are quarantined and counted; above this share of the source's the stage fails."""

    @model_validator(mode="after")
    def _has_one_place(self) -> PromptSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source {self.name!r}: give one of path and hub")
        of_hub = ("subset", "test_split", "revision")
        ignored = [name for name in (of_hub if self.hub is None else ("test_path",)) if getattr(self, name) is not None]
        if ignored or (self.hub is None and self.split != "train"):
            place = "path" if self.hub is None else "hub"
            raise ValueError(f"source {self.name!r}: {', '.join(ignored) or 'split'} means nothing with `{place}`")
        return self

    @model_validator(mode="after")
    def _revision_is_fixed(self) -> PromptSource:
        if self.revision is not None and not re.fullmatch("[0-9a-f]{7,40}", self.revision):
            raise ValueError(
                f"source {self.name!r}: revision {self.revision!r} is no commit (7 to 40 digits of 0-9a-f); a branch "
                "or tag may move, and the prompts would stay"
            )
        return self

    @model_validator(mode="after")
    def _shares_leave_room(self) -> PromptSource:
        if self.has_official_test and self.test_ratio:
            raise ValueError(f"source {self.name!r}: it has an official test split; remove test_ratio")
        total = sum(self.shares.values())
        if total > 1 + 1e-9:
            raise ValueError(f"source {self.name!r}: the shares add up to {total:g}, expected at most 1")
        return self

    @property
    def has_official_test(self) -> bool:
        """Whether its test split is given, not chosen."""
        return self.test_path is not None or self.test_split is not None

    @property
    def shares(self) -> dict[str, float]:
        """The shares in their order; what is left is `train`."""
        default = 0.0 if self.has_official_test else 0.1
        return {
            "test": default if self.test_ratio is None else self.test_ratio,
            "validation": self.validation_ratio,
            "documents": self.documents_ratio,
            "demonstrations": self.demonstrations_ratio,
        }


FAMILY_NAMES = (
    "copy", "reverse", "sort", "largest", "first_word", "last_word", "count", "addition", "subtraction", "compare",
    "multiplication", "remainder", "base", "expression",
)  # fmt: skip


class PromptsConfig(Extensible):
    """Questions and answers: generated families of tasks that a program can verify, and data sets; split once for the
    whole pipeline.
    """

    seed: int = 0
    """Seed of the generator."""
    families: Annotated[tuple[str, ...], BuiltIn("question family", FAMILY_NAMES)] = ("copy", "reverse", "sort")
    """Task families: those of `lilpipe.alignment.questions.families`, or your own."""
    difficulty: dict[str, tuple[PositiveInt, PositiveInt]] = {}
    """Least and most difficulty of a family, in its unit (items, digits, operations); its default where none is given.
    Pretraining's exercises leave out the hardest."""
    sources: tuple[PromptSource, ...] = ()
    """Data sets beside the generated tasks."""
    num_documents: NonNegativeInt = 20_000
    """Exercises in plain text form for pretraining."""
    num_demonstrations: NonNegativeInt = 1_000
    """Prompts with a written answer, for supervised fine-tuning."""
    num_train: PositiveInt = 4_000
    """Prompts without an answer, for sampling: rejection sampling, DPO, GRPO."""
    num_validation: PositiveInt = 300
    """Held-out prompts on which hyperparameters may be chosen."""
    num_test: PositiveInt = 500
    """Held-out prompts that only `evaluate` reads."""
    filler_ratio: Ratio = 0.75
    """Share of written answers, in exercises and demonstrations, that open with sentences of courtesy."""
    max_filler_sentences: Annotated[int, Field(ge=0, le=8)] = 3
    """Most sentences of courtesy before an answer."""

    @model_validator(mode="after")
    def _difficulty_is_of_families(self) -> PromptsConfig:
        for family, (least, most) in self.difficulty.items():
            if family not in self.families:
                raise ValueError(f"prompts.difficulty: {family!r} is none of prompts.families: {list(self.families)}")
            if least > most:
                raise ValueError(f"prompts.difficulty.{family}: got {least} to {most}, expected the least first")
        return self

    @model_validator(mode="after")
    def _something_to_ask(self) -> PromptsConfig:
        if not self.families and not self.sources:
            raise ValueError("prompts: got neither families nor sources; name one")
        names = [*self.families, *(source.name for source in self.sources)]
        if len(set(names)) != len(names):
            raise ValueError(f"prompts: names of families and sources must differ, got {names}")
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
"""The options of each kind; one given to another kind is refused, as it would be ignored."""

_NEEDED: Mapping[str, tuple[str, ...]] = {"regex": ("pattern",)}


class RewardConfig(WithOptions):
    """One reward of a completion; a stage adds up those that it names, each by its weight."""

    kind: Annotated[str, BuiltIn("reward", get_args(RewardKind))]
    """`answer`: 1 if the prompt's own verifier accepts the completion. `numeric`: 1 if it states the number of the
    prompt's answer. `format`: 1 if it has the form of `template`. `regex`: 1 if `pattern` is found in it. `length`:
    near `target_tokens`, or a penalty beyond `limit_tokens`. `language`: the probability of `language`. `reward_model`:
    the score of the stage's input `reward_model`. `program`: 1 if its code passes the prompt's tests. Or a
    reward of your own."""
    weight: float = 1.0
    """Factor of this reward in the sum; negative for a penalty."""
    name: str | None = None
    """Name in logs and tables; the kind where none is given."""
    marker: str | None = None
    """Text before the number (`numeric`), such as `####`; the last number of the completion where none is given."""
    tolerance: NonNegativeFloat | None = None
    """Largest difference to the right number (`numeric`); 0 where none is given."""
    template: Literal["answer", "think"] | None = None
    """`answer`: courtesy or steps, then `Answer: X` (the default). `think`: `<think>..</think><answer>..</answer>`
    (DeepSeek-R1)."""
    pattern: str | None = None
    """Regular expression (`regex`), in Python's syntax; `.` matches a line's end too."""
    target_tokens: PositiveInt | None = None
    """Length wanted (`length`): 1 there, down to 0 at no tokens or twice as many."""
    limit_tokens: PositiveInt | None = None
    """Length that is too long (`length`): -1 from there (soft over-long punishment, Yu et al. 2025, DAPO)."""
    buffer_tokens: PositiveInt | None = None
    """Tokens before `limit_tokens` over which the penalty grows from 0; a fifth of it where none is given."""
    language: str | None = None
    """Code of the language wanted (`language`), such as `en`, the default."""
    timeout_seconds: PositiveFloat | None = None
    """Time of a program (`program`), by the clock and of the processor; 5 where none is given."""
    memory_mib: PositiveInt | None = None
    """Address space of a program (`program`); 256 where none is given."""

    @model_validator(mode="after")
    def _options_match_kind(self) -> RewardConfig:
        options = _OPTIONS.get(self.kind, ())
        allowed = {"kind", "weight", "name", "file", "options", *options}
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if unused := sorted(given - allowed):
            expected = ", ".join(options) or "none"
            raise ValueError(
                f"reward of kind {self.kind!r}: got options {', '.join(unused)}, expected of {expected}; remove them"
            )
        if self.pattern is not None:
            _check_pattern(self.pattern)
        if missing := [name for name in _NEEDED.get(self.kind, ()) if name not in given]:
            raise ValueError(f"reward of kind {self.kind!r}: needs {' and '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _length_has_one_aim(self) -> RewardConfig:
        if self.kind == "length" and (self.target_tokens is None) == (self.limit_tokens is None):
            raise ValueError("reward of kind 'length': give one of target_tokens and limit_tokens")
        if self.buffer_tokens is not None and self.buffer_tokens > (self.limit_tokens or 0):
            raise ValueError(
                f"reward of kind 'length': buffer_tokens {self.buffer_tokens} is more than limit_tokens "
                f"{self.limit_tokens}; it is the stretch before that limit"
            )
        return self

    @property
    def label(self) -> str:
        """The name in logs and tables."""
        return self.name or self.kind


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"reward of kind 'regex': pattern {pattern!r} is no regular expression: {error}") from error


def _names_differ(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    names = [reward.label for reward in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards: names must differ, got {names}; give each a `name`")
    return rewards


RewardConfigs = Annotated[tuple[RewardConfig, ...], Field(min_length=1), AfterValidator(_names_differ)]
"""The rewards of a stage. ``(RewardConfig(kind="answer"),)`` is 1 for a completion that is correct and ended."""

ANSWER_REWARD: tuple[RewardConfig, ...] = (RewardConfig(kind="answer"),)
"""The default of every stage."""
