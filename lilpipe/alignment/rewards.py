"""What a response is worth: weighted sums of small rewards, each logged apart; the verifier's verdict, and the
preference that pairs and win rates are made from.

A kind of reward is a function from its settings to a function of prompts and responses; ``KINDS`` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lilpipe.alignment.prompts import Prompt, is_well_formed, verify
from lilpipe.config import RewardConfig
from lilpipe.errors import ConfigError
from lilpipe.tokenizer.chat_template import Message


class RewardModel(Protocol):
    """What scores conversations: `lilpipe.alignment.reward_model.RewardModel`, or a test's stand-in."""

    def score(self, conversations: Sequence[list[Message]]) -> list[float]:
        """A score for each conversation, which ends in an assistant's turn."""
        ...


@dataclass(frozen=True)
class Response:
    """What a model answered."""

    text: str
    ended: bool
    """Whether the model ended it; one that was cut off is neither well-formed nor correct."""
    num_tokens: int


@dataclass(frozen=True)
class Scored:
    """What a response is worth."""

    total: float
    """Sum of the parts, each by its weight."""
    parts: dict[str, float]
    """Each reward by its name, before weighting."""


Score = Callable[[Sequence[Prompt], Sequence[Response]], list[float]]
"""A reward: a number for each response."""


class Rewards:
    """The rewards of a stage.

    Raises:
        ConfigError: A reward needs a reward model and there is none.
    """

    def __init__(self, configs: Sequence[RewardConfig], *, reward_model: RewardModel | None = None) -> None:
        self.configs = tuple(configs)
        self.names = [config.label for config in configs]
        self._scores = [KINDS[config.kind](config, reward_model) for config in configs]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Scored]:
        """The worth of each response to the prompt at the same place."""
        columns = [score(prompts, responses) for score in self._scores]
        return [
            Scored(
                sum(config.weight * value for config, value in zip(self.configs, values, strict=True)),
                dict(zip(self.names, values, strict=True)),
            )
            for values in zip(*columns, strict=True)
        ]


def _each(function: Callable[[Prompt, Response], float]) -> Score:
    return lambda prompts, responses: [function(*pair) for pair in zip(prompts, responses, strict=True)]


def _answer(config: RewardConfig, reward_model: RewardModel | None) -> Score:  # noqa: ARG001 (the form of a kind)
    return _each(lambda prompt, response: float(response.ended and verify(prompt, response.text)))


def _reward_model(config: RewardConfig, reward_model: RewardModel | None) -> Score:
    if reward_model is None:
        raise ConfigError(
            f"reward {config.label!r} is of kind 'reward_model', but the step has no reward model; give it an input "
            "`reward_model`, or take the reward out"
        )

    def score(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        return reward_model.score([as_messages(*pair) for pair in zip(prompts, responses, strict=True)])

    return score


def as_messages(prompt: Prompt, response: Response) -> list[Message]:
    """Question and response as a conversation."""
    return [{"role": "user", "content": prompt.question}, {"role": "assistant", "content": response.text}]


KINDS: dict[str, Callable[[RewardConfig, RewardModel | None], Score]] = {
    "answer": _answer,
    "reward_model": _reward_model,
}
"""Every kind of reward: its settings and the stage's reward model, if it has one, to the reward."""


# --- verdicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a program can say about a response."""

    ended: bool
    """Whether the model ended it; one that was cut off is neither well-formed nor correct."""
    well_formed: bool
    correct: bool
    num_words: int


def judge(prompt: Prompt, response: str, *, ended: bool) -> Verdict:
    """The verdict on a response."""
    return Verdict(
        ended=ended,
        well_formed=ended and is_well_formed(response),
        correct=ended and verify(prompt, response),
        num_words=len(response.split()),
    )


def reward(verdict: Verdict) -> float:
    """1 for a response that is correct and ended, 0 for any other."""
    return float(verdict.correct)


def brevity_win(well_formed: tuple[bool, bool], num_words: tuple[int, int]) -> float:
    """1 if the first of two responses wins, 0 if the second does, 0.5 for a tie.

    A response that is not well-formed loses against one that is; otherwise the one with fewer words wins.
    """
    if well_formed[0] != well_formed[1]:
        return float(well_formed[0])
    if num_words[0] != num_words[1]:
        return float(num_words[0] < num_words[1])
    return 0.5
