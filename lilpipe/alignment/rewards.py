"""What a response is worth: the verifier's verdict, and the preference that pairs and win rates are made from."""

from __future__ import annotations

from dataclasses import dataclass

from lilpipe.alignment.prompts import Prompt, is_well_formed, verify


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
