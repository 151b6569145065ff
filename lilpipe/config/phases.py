"""Phases of pretraining: what is trained on, and in what portions, from one step up to another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lilpipe.config.section import Ratio, Section


class MixtureConfig(Section):
    """How the training tokens of the corpus are shared out among its streams; see `tokens.streams_by`."""

    weights: dict[str, NonNegativeFloat] = {}
    """Weight of each stream, by tokens, in any unit; a stream that is not named has none. Empty: every stream in
    proportion to its tokens. Llama 3 (Grattafiori et al. 2024, 3.1.2): 50 general, 25 mathematics and reasoning,
    17 code, 8 multilingual."""
    max_epochs: PositiveFloat = 4.0
    """Most times that a token of a stream is trained on; what a stream cannot give goes to the others in proportion
    to their weights. Up to 4 epochs repeated text is worth nearly as much as new (Muennighoff et al. 2023). In a
    phase what earlier ones took counts."""
    max_epochs_of: dict[str, PositiveFloat] = {}
    """Another limit for single streams."""


class PhaseConfig(Section):
    """A part of pretraining with settings of its own, from one step up to the next phase or the end.

    What a phase does not name is as pretraining has it, whatever the phase before had. Phases make a batch ramp
    (Llama 3: 4 M, 8 M, 16 M tokens), stages of context length (8 k to 128 k in six) and annealing on the best data.
    """

    from_step: PositiveInt
    """First step of the phase, counted from 0."""
    batch_size: PositiveInt | None = None
    """Sequences of a step."""
    accumulation_steps: PositiveInt | None = None
    """Micro-batches of a step."""
    seq_len: PositiveInt | None = None
    """Tokens of a sequence; at most model.max_seq_len."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary embedding, raised with the length of the context (Xiong et al. 2023)."""
    exercise_ratio: Ratio | None = None
    mixture: MixtureConfig | None = None


class Phase(NamedTuple):
    """The settings of the steps ``first`` to ``stop - 1``, those that they take from pretraining filled in."""

    number: int
    """0 up to the first of `phases`, n from its n-th on."""
    first: int
    stop: int
    batch_size: int
    accumulation_steps: int
    seq_len: int
    rope_theta: float
    exercise_ratio: float
    mixture: MixtureConfig

    def setting(self, name: str) -> str:
        """Where in the section the phase's settings stand: ``batch_size``, or ``phases.0.batch_size``."""
        return f"phases.{self.number - 1}.{name}" if self.number else name


def resolve_phases(whole: Phase, changes: Sequence[PhaseConfig]) -> tuple[Phase, ...]:
    """Cut the run into phases: the first as ``whole`` says, and one from each of ``changes`` on."""
    named = [{name: value for name, value in each if name in Phase._fields and value is not None} for each in changes]
    bounds = [whole.first, *(each.from_step for each in changes), whole.stop]
    return tuple(
        whole._replace(number=number, first=first, stop=stop, **settings)
        for number, (settings, (first, stop)) in enumerate(zip([{}, *named], pairwise(bounds), strict=True))
    )
