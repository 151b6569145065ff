"""What a completion is worth: weighted sums of small rewards, each logged apart; the verifier's verdict, and the
preference that pairs and win rates are made from.

A kind of reward is a function from its settings to a function of prompts and completions; ``KINDS`` names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Protocol

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
    """What scores conversations: `lilpipe.alignment.rewards.reward_model.RewardModel`, or a test's stand-in."""

    def score(self, conversations: Sequence[list[Message]]) -> list[float]:
        """A score for each conversation, which ends in an assistant's turn."""
        ...


@dataclass(frozen=True)
class CompletionText:
    """What a model answered."""

    text: str
    ended: bool
    """Whether the model ended it; one that was cut off is neither well-formed nor correct."""
    num_tokens: int


@dataclass(frozen=True)
class Scored:
    """What a completion is worth."""

    total: float
    """Sum of the parts, each by its weight."""
    parts: dict[str, float]
    """Each reward by its name, before weighting."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why, by the reward's name, where the reward says so: how a program ended."""


RewardPart = tuple[float, str]
"""A reward and its reason; an empty one where the number says all."""
Score = Callable[[Sequence[Prompt], Sequence[CompletionText]], list[RewardPart]]


class Rewards:
    """The rewards of a stage.

    Raises:
        ConfigError: A reward needs a reward model and there is none, its language is not known, or the user's own
            cannot be imported.
    """

    def __init__(self, configs: Sequence[RewardConfig], *, reward_model: RewardModel | None = None) -> None:
        self.configs = tuple(configs)
        self.names = [config.label for config in configs]
        self._scores = [KINDS.get(config.kind, _own)(config, reward_model) for config in configs]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[CompletionText]) -> list[Scored]:
        """The worth of each completion to the prompt at the same place."""
        columns = [score(prompts, completions) for score in self._scores]
        return [self._sum(parts) for parts in zip(*columns, strict=True)]

    def log_sandbox(self, prompts: Sequence[Prompt], workspace: Workspace) -> None:
        """Say in a stage's log what keeps programs in, where rewards or the prompts' verifiers run any."""
        if any(config.kind == "program" for config in self.configs) or any(p.verifier == "program" for p in prompts):
            workspace.log(protection())

    def _sum(self, parts: Sequence[RewardPart]) -> Scored:
        return Scored(
            sum(config.weight * value for config, (value, _) in zip(self.configs, parts, strict=True)),
            {name: value for name, (value, _) in zip(self.names, parts, strict=True)},
            {name: reason for name, (_, reason) in zip(self.names, parts, strict=True) if reason},
        )


def external(section: Any) -> dict[str, str]:
    """Digests of the files that the rewards of a stage's section read: a `Stage.external`."""
    digests = {}
    for config in section.rewards:
        if config.kind == "language":
            digests[f"reward {config.label}"] = digest_file(bundled_model_path())
    return digests


# --- kinds --------------------------------------------------------------------------------------------------------


def _each(function: Callable[[Prompt, CompletionText], float]) -> Score:
    return lambda prompts, completions: [(function(*pair), "") for pair in zip(prompts, completions, strict=True)]


def _of_ended(accepts: Callable[[Prompt, str], bool]) -> Score:
    """1 for a completion that ended and is accepted."""
    return _each(lambda prompt, completion: float(completion.ended and accepts(prompt, completion.text)))


def _answer(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001 (the form of a kind)
    return _of_ended(verify)


def _numeric(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    tolerance = Decimal(str(config.tolerance or 0))

    def accepts(prompt: Prompt, completion: str) -> bool:
        right, stated = stated_number(prompt.answer), stated_number(completion, config.marker)
        return right is not None and stated is not None and abs(right - stated) <= tolerance

    return _of_ended(accepts)


def _format(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    has_template = is_thinking if config.template == "think" else is_well_formed
    return _of_ended(lambda _, completion: has_template(completion))


def _regex(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    pattern = re.compile(config.pattern or "", re.DOTALL)
    return _of_ended(lambda _, completion: pattern.search(completion) is not None)


def length_reward(num_tokens: int, target: int) -> float:
    """1 at ``target`` tokens, falling evenly to 0 at none and at twice as many."""
    return max(0.0, 1 - abs(num_tokens - target) / target)


def overlong_penalty(num_tokens: int, *, limit: int, buffer: int) -> float:
    """0 up to ``limit - buffer`` tokens, falling evenly to -1 at ``limit`` (Yu et al. 2025, DAPO, equation 13)."""
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
            f"reward {config.label!r}: language {wanted!r} is not known; expected a code among "
            f"{' '.join(sorted(known))}"
        )

    def probability(_: Prompt, completion: CompletionText) -> float:
        language, score = identify(completion.text)
        return min(1.0, score) if language == wanted else 0.0

    return _each(probability)


def as_messages(prompt: Prompt, completion: CompletionText) -> list[Message]:
    """Question and completion as a conversation."""
    return [{"role": "user", "content": prompt.question}, {"role": "assistant", "content": completion.text}]


def _reward_model(config: RewardConfig, reward_model: RewardModel | None) -> Score:
    if reward_model is None:
        raise ConfigError(
            f"reward {config.label!r} is of kind 'reward_model', but the step has no reward model; give it an input "
            "`reward_model`, or take the reward out"
        )

    def score(prompts: Sequence[Prompt], completions: Sequence[CompletionText]) -> list[RewardPart]:
        values = reward_model.score([as_messages(*pair) for pair in zip(prompts, completions, strict=True)])
        if not all(map(math.isfinite, values)):
            raise DataError(f"reward {config.label!r}: the reward model's score is not finite: train it again")
        return [(value, "") for value in values]

    return score


def _program(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001
    memory_bytes = config.memory_mib * 2**20 if config.memory_mib else Limits.memory_bytes
    isolation()  # is told of before the first program runs
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
    """A function of the user's: ``(prompt, completion, **options)`` to a number."""
    extension = config.extension()
    assert extension is not None
    function = partial(load_extension(extension), **config.options)
    return _each(partial(_call, function, f"reward {config.label!r}"))


def _call(
    function: Callable[[Prompt, CompletionText], Any], where: str, prompt: Prompt, completion: CompletionText
) -> float:
    try:
        value = float(function(prompt, completion))
    except Exception as error:  # whatever a user's function raises
        raise DataError(f"{where} fails on prompt {prompt.id!r}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise DataError(f"{where} gave {value} for prompt {prompt.id!r}, expected a finite number")
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
"""Every built-in kind of reward: its settings and the stage's reward model, if it has one, to the reward."""


# --- verdicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a program can say about a completion."""

    ended: bool
    """Whether the model ended it; one that was cut off is neither well-formed nor correct."""
    well_formed: bool
    correct: bool
    num_words: int


def judge(prompt: Prompt, completion: str, *, ended: bool) -> Verdict:
    """The verdict on a completion."""
    return Verdict(
        ended=ended,
        well_formed=ended and has_form(prompt, completion),
        correct=ended and verify(prompt, completion),
        num_words=len(completion.split()),
    )


def reward(verdict: Verdict) -> float:
    """1 for a completion that is correct and ended, 0 for any other."""
    return float(verdict.correct)


def brevity_win(well_formed: tuple[bool, bool], num_words: tuple[int, int]) -> float:
    """1 if the first of two completions wins, 0 if the second does, 0.5 for a tie.

    A completion that is not well-formed loses against one that is; otherwise the one with fewer words wins.
    """
    if well_formed[0] != well_formed[1]:
        return float(well_formed[0])
    if num_words[0] != num_words[1]:
        return float(num_words[0] < num_words[1])
    return 0.5
