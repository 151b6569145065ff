"""Reward functions: a weighted sum of named rewards, the verifier's verdict, and win rates by brevity.

``KINDS`` maps each kind of reward to a factory: from its settings to a function of prompts and completions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Protocol

from lilpipe.alignment.verify.numerals import one_number
from lilpipe.alignment.verify.sandbox import Limits, find_program, isolation, protection, run_programs
from lilpipe.alignment.verify.verifiers import has_form, is_thinking, is_well_formed, stated_number, verify
from lilpipe.config.prompts import RewardConfig
from lilpipe.data.filters.fasttext_model import codes, load
from lilpipe.data.filters.language import bundled_model_path, identify
from lilpipe.digests import digest_file
from lilpipe.errors import ConfigError, DataError
from lilpipe.extensions import load as load_extension
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.messages import Message
from lilpipe.stage import Workspace


class RewardModel(Protocol):
    """Scores conversations: `lilpipe.alignment.rewards.scoring.RewardModel`, or a stub in tests."""

    def score(self, conversations: Sequence[list[Message]]) -> list[float]:
        """Return a score for each conversation, which ends with an assistant turn."""
        ...


@dataclass(frozen=True)
class CompletionText:
    """Completion as passed to a reward."""

    text: str
    ended: bool
    """Whether the model ended it; a truncated completion is neither well-formed nor correct."""
    num_tokens: int


@dataclass(frozen=True)
class Scored:
    """Reward of a completion."""

    total: float
    """Weighted sum of the parts."""
    parts: dict[str, float]
    """Unweighted rewards by name."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reasons by the reward's name, if the reward gives one: how a program ended."""


RewardPart = tuple[float, str]
"""A reward and its reason, empty if there is none."""
Score = Callable[[Sequence[Prompt], Sequence[CompletionText]], list[RewardPart]]


class Rewards:
    """Rewards of a stage.

    Raises:
        ConfigError: A reward needs a reward model and there is none, its language is unknown, or an
            extension cannot be imported.
    """

    def __init__(self, configs: Sequence[RewardConfig], *, reward_model: RewardModel | None = None) -> None:
        self.configs = tuple(configs)
        self.names = [config.label for config in configs]
        self._scores = [KINDS.get(config.kind, _own)(config, reward_model) for config in configs]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[CompletionText]) -> list[Scored]:
        """Return the reward of each completion to the prompt at the same index."""
        columns = [score(prompts, completions) for score in self._scores]
        return [self._sum(parts) for parts in zip(*columns, strict=True)]

    def log_sandbox(self, prompts: Sequence[Prompt], workspace: Workspace) -> None:
        """Log the sandbox's isolation if rewards or the prompts' verifiers run programs."""
        if any(config.kind == "program" for config in self.configs) or any(p.verifier == "program" for p in prompts):
            workspace.log(protection())

    def _sum(self, parts: Sequence[RewardPart]) -> Scored:
        return Scored(
            sum(config.weight * value for config, (value, _) in zip(self.configs, parts, strict=True)),
            {name: value for name, (value, _) in zip(self.names, parts, strict=True)},
            {name: reason for name, (_, reason) in zip(self.names, parts, strict=True) if reason},
        )


def external(section: Any) -> dict[str, str]:
    """Return digests of the files that the rewards of a config section read: a `Stage.external`."""
    digests = {}
    for config in section.rewards:
        if config.kind == "language":
            digests[f"reward {config.label}"] = digest_file(bundled_model_path())
    return digests


# --- kinds --------------------------------------------------------------------------------------------------------


def _each(function: Callable[[Prompt, CompletionText], float]) -> Score:
    return lambda prompts, completions: [(function(*pair), "") for pair in zip(prompts, completions, strict=True)]


def _of_ended(accepts: Callable[[Prompt, str], bool]) -> Score:
    """Return 1 for a completion that ended and is accepted, else 0."""
    return _each(lambda prompt, completion: float(completion.ended and accepts(prompt, completion.text)))


def _answer(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001 (signature of a kind)
    return _of_ended(verify)


def _numeric(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    tolerance = Decimal(str(config.tolerance or 0))

    def accepts(prompt: Prompt, completion: str) -> bool:
        right, stated = one_number(prompt.answer), stated_number(completion, config.marker)
        return right is not None and stated is not None and abs(right.value - stated) <= tolerance

    return _of_ended(accepts)


def _format(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    has_template = is_thinking if config.template == "think" else is_well_formed
    return _of_ended(lambda _, completion: has_template(completion))


def _regex(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    pattern = re.compile(config.pattern or "", re.DOTALL)
    return _of_ended(lambda _, completion: pattern.search(completion) is not None)


def length_reward(num_tokens: int, target: int) -> float:
    """Return 1 at ``target`` tokens, decreasing linearly to 0 at 0 and at 2 * ``target`` tokens."""
    return max(0.0, 1 - abs(num_tokens - target) / target)


def overlong_penalty(num_tokens: int, *, limit: int, buffer: int) -> float:
    """Return 0 up to ``limit - buffer`` tokens, linear down to -1 at ``limit`` (DAPO, Yu et al. 2025, equation 13)."""
    return -min(1.0, max(0.0, (num_tokens - (limit - buffer)) / buffer))


def _length(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    if config.target_tokens is not None:
        return _each(lambda _, completion, target=config.target_tokens: length_reward(completion.num_tokens, target))
    limit = config.limit_tokens or 1
    buffer = config.buffer_tokens or max(1, limit // 5)
    return _each(lambda _, completion: overlong_penalty(completion.num_tokens, limit=limit, buffer=buffer))


def _language(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    wanted = config.language or "en"
    known = codes(load(bundled_model_path(), "language"))
    if wanted not in known:
        raise ConfigError(
            f"reward {config.label!r}: language {wanted!r} is unknown; expected one of the codes "
            f"{' '.join(sorted(known))}"
        )

    def probability(_: Prompt, completion: CompletionText) -> float:
        language, score = identify(completion.text)
        return min(1.0, score) if language == wanted else 0.0

    return _each(probability)


def as_messages(prompt: Prompt, completion: CompletionText) -> list[Message]:
    """Return question and completion as a conversation."""
    return [{"role": "user", "content": prompt.question}, {"role": "assistant", "content": completion.text}]


def _reward_model(config: RewardConfig, reward_model: RewardModel | None) -> Score:
    if reward_model is None:
        raise ConfigError(
            f"reward {config.label!r} is of kind 'reward_model', but the step has no reward model; add an input "
            "`reward_model`, or remove the reward"
        )

    def score(prompts: Sequence[Prompt], completions: Sequence[CompletionText]) -> list[RewardPart]:
        values = reward_model.score([as_messages(*pair) for pair in zip(prompts, completions, strict=True)])
        if not all(map(math.isfinite, values)):
            raise DataError(f"reward {config.label!r}: the reward model's score is not finite; train the model again")
        return [(value, "") for value in values]

    return score


def _program(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    memory_bytes = config.memory_mib * 2**20 if config.memory_mib else Limits.memory_bytes
    isolation()  # warns now if isolation is incomplete, before the first program runs
    limits = Limits(cpu_seconds=config.timeout_seconds or Limits.cpu_seconds, memory_bytes=memory_bytes)

    def score(prompts: Sequence[Prompt], completions: Sequence[CompletionText]) -> list[RewardPart]:
        programs = [find_program(completion.text) if completion.ended else None for completion in completions]
        jobs = [(program, prompt.answer) for program, prompt in zip(programs, prompts, strict=True) if program]
        outcomes = iter(run_programs(jobs, limits))
        parts = []
        for program in programs:
            outcome = next(outcomes) if program else None
            parts.append((float(outcome.passed), outcome.reason) if outcome else (0.0, "no_program"))
        return parts

    return score


def _own(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    """Return a custom reward: ``(prompt, completion, **options) -> float``."""
    extension = config.extension()
    assert extension is not None
    function = partial(load_extension(extension), **config.options)
    return _each(partial(_call, function, f"reward {config.label!r}"))


def _call(
    function: Callable[[Prompt, CompletionText], Any], where: str, prompt: Prompt, completion: CompletionText
) -> float:
    try:
        value = float(function(prompt, completion))
    except Exception as error:  # a user's function can raise anything
        raise DataError(f"{where} fails on prompt {prompt.id!r}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise DataError(f"{where} returned {value} for prompt {prompt.id!r}, expected a finite number")
    return value


KINDS: dict[str, Callable[[RewardConfig, RewardModel | None], Score]] = {
    "answer": _answer,
    "numeric": _numeric,
    "format": _format,
    "regex": _regex,
    "length": _length,
    "language": _language,
    "reward_model": _reward_model,
    "program": _program,
}
"""Factory of each built-in kind of reward, from its settings and the stage's reward model, if any."""


# --- verdicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Verdict of the verifier on a completion."""

    ended: bool
    """Whether the model ended it; a truncated completion is neither well-formed nor correct."""
    well_formed: bool
    correct: bool
    num_words: int


def judge(prompt: Prompt, completion: str, *, ended: bool) -> Verdict:
    """Return the verdict on a completion."""
    return Verdict(
        ended=ended,
        well_formed=ended and has_form(prompt, completion),
        correct=ended and verify(prompt, completion),
        num_words=len(completion.split()),
    )


def reward(verdict: Verdict) -> float:
    """Return 1 for a completion that ended and is correct, else 0."""
    return float(verdict.correct)


def brevity_win(well_formed: tuple[bool, bool], num_words: tuple[int, int]) -> float:
    """Return 1 if the first of two completions wins, 0 if the second wins, 0.5 for a tie.

    A well-formed completion wins against one that is not; otherwise the one with fewer words wins.
    """
    if well_formed[0] != well_formed[1]:
        return float(well_formed[0])
    if num_words[0] != num_words[1]:
        return float(num_words[0] < num_words[1])
    return 0.5
