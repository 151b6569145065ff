"""Phases of pretraining: data mixture, batch and context length from one optimizer step to another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lilpipe.config.section import Ratio, Section


class MixtureConfig(Section):
    """Proportions of the streams in the training tokens of the corpus; see `tokens.streams_by`."""

    weights: dict[str, NonNegativeFloat] = {}
    """Weight of each stream by tokens, in any unit; a stream that is not named is not used. If empty, streams are used
    in proportion to their tokens. Llama 3 (Grattafiori et al. 2024, 3.1.2): 50 general, 25 mathematics and reasoning,
    17 code, 8 multilingual."""
    max_epochs: PositiveFloat = 4.0
    """Maximum number of epochs over a stream; tokens that a stream cannot provide come from the others in proportion to
    their weights. Up to 4 epochs, repeated text is worth nearly as much as new text (Muennighoff et al. 2023). Epochs
    of earlier phases count."""
    max_epochs_of: dict[str, PositiveFloat] = {}
    """Maximum number of epochs of single streams; overrides `max_epochs`."""


class PhaseConfig(Section):
    """Part of pretraining with its own settings, from one optimizer step to the next phase or the end.

    Settings that a phase does not name have pretraining's values, not those of the previous phase. Phases express a
    batch ramp (Llama 3: 4 M, 8 M, 16 M tokens), context extension (8 k to 128 k in six stages) and annealing on the
    best data.
    """

    from_step: PositiveInt
    """First optimizer step of the phase, counted from 0."""
    batch_size: PositiveInt | None = None
    """Sequences per optimizer step."""
    accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimizer step."""
    seq_len: PositiveInt | None = None
    """Tokens per sequence; at most model.max_seq_len."""
    rope_theta: PositiveFloat | None = None
    """Base frequency of RoPE, raised with the context length (Xiong et al. 2023)."""
    exercise_ratio: Ratio | None = None
    """Fraction of tokens from the exercises of the `prompts` stage."""
    mixture: MixtureConfig | None = None
    """Proportions of the streams."""


class Phase(NamedTuple):
    """Complete settings of the optimizer steps ``first`` to ``stop - 1``; what a phase does not set comes from
    pretraining.
    """

    number: int
    """0 for the steps before the first entry of `phases`, n for its n-th entry."""
    first: int
    stop: int
    batch_size: int
    accumulation_steps: int
    seq_len: int
    rope_theta: float
    exercise_ratio: float
    mixture: MixtureConfig

    def setting(self, name: str) -> str:
        """Return the path of one of the phase's settings in the section: ``batch_size``, or ``phases.0.batch_size``."""
        return f"phases.{self.number - 1}.{name}" if self.number else name


def resolve_phases(whole: Phase, changes: Sequence[PhaseConfig]) -> tuple[Phase, ...]:
    """Divide the run into phases: the first has the settings of ``whole``, and each of ``changes`` starts another."""
    named = [{name: value for name, value in each if name in Phase._fields and value is not None} for each in changes]
    bounds = [whole.first, *(each.from_step for each in changes), whole.stop]
    return tuple(
        whole._replace(number=number, first=first, stop=stop, **settings)
        for number, (settings, (first, stop)) in enumerate(zip([{}, *named], pairwise(bounds), strict=True))
    )
