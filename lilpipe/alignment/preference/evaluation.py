"""Evaluation of preference training on validation completions: metrics, alarm, curves and examples.

Dimensions: N chosen completions, M rejected ones (equal for pairs), S completions of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilpipe import charts, page
from lilpipe.alignment.preference.data import Packer, PromptCompletion
from lilpipe.alignment.preference.objective import positive_ratio
from lilpipe.config.dpo import DPOConfig
from lilpipe.errors import DataError
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.precision import autocast
from lilpipe.training.training_report import Curve

CHOSEN_FALL_ALARM = 1.0
"""Maximum fall, in nats, of the mean log-probability of chosen validation completions before a warning.

DPO can widen its margin while both completions become unlikely; accuracy falls with them.
"""
COMPLETIONS_AT_ONCE = 64
EXAMPLES = 6


@torch.inference_mode()
def score_completions(
    model: Transformer, completions: Sequence[PromptCompletion], packer: Packer, config: DPOConfig
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each completion and its number of counted tokens [S], on the CPU."""
    sums, lengths = [torch.empty(0)], [torch.empty(0)]
    for start in range(0, len(completions), COMPLETIONS_AT_ONCE):
        batch, places = packer(completions[start : start + COMPLETIONS_AT_ONCE])
        with autocast(config.precision, batch.inputs.device):
            scores = model(batch.inputs, targets_BT=batch.targets, documents_BT=batch.documents)
        sums.append((places.read(scores) * places.counted_SA).sum(dim=1).cpu())
        lengths.append(places.counted_SA.sum(dim=1).cpu())
    return torch.cat(sums), torch.cat(lengths)


@dataclass(frozen=True)
class PreferenceValidation:
    """Validation completions; if ``paired``, the chosen and the rejected one at an index share a prompt."""

    chosen: Sequence[PromptCompletion]
    rejected: Sequence[PromptCompletion]
    paired: bool

    def score(self, model: Transformer, packer: Packer, config: DPOConfig) -> ValidationScores:
        """Return the log-probabilities of all completions."""
        return ValidationScores(
            *score_completions(model, self.chosen, packer, config),
            *score_completions(model, self.rejected, packer, config),
        )

    def metrics(self, now: ValidationScores, before: ValidationScores, config: DPOConfig) -> dict[str, float]:
        """Return the metrics of a model; empty without completions.

        ``before`` are the scores of the initial model. ``validation_preference_accuracy`` is the share of pairs whose
        chosen completion has the higher reward (ties count half, so the initial model has 0.5 against itself as
        reference). ``validation_likelihood_accuracy`` is the share whose chosen completion is more likely. Unpaired,
        each chosen completion is compared with each rejected one.
        """
        if not self.chosen or not self.rejected:
            return {}
        chosen_N, rejected_M = now.ratios(before, config)
        margins = self._differences(chosen_N, rejected_M)
        change = (now.chosen_N - before.chosen_N).mean().item()
        return {
            "validation_preference_accuracy": positive_ratio(margins),
            "validation_likelihood_accuracy": positive_ratio(self._differences(now.chosen_N, now.rejected_M)),
            "validation_margin": margins.mean().item(),
            "validation_reward_chosen": config.beta * chosen_N.mean().item(),
            "validation_reward_rejected": config.beta * rejected_M.mean().item(),
            "validation_chosen_logprob": now.chosen_N.mean().item(),
            "validation_rejected_logprob": now.rejected_M.mean().item(),
            "validation_chosen_change": change,
            "chosen_fall_alarm": float(change < -CHOSEN_FALL_ALARM),
        }

    def _differences(self, chosen_N: Tensor, rejected_M: Tensor) -> Tensor:
        """Return chosen minus rejected for all comparisons."""
        return chosen_N - rejected_M if self.paired else (chosen_N[:, None] - rejected_M).flatten()

    def sections(
        self,
        tokenizer: Tokenizer,
        curves: dict[str, Curve],
        *,
        before: ValidationScores,
        after: ValidationScores,
        config: DPOConfig,
    ) -> page.Sections:
        """Return report sections: curves over optimizer steps, and examples with their log-probabilities."""
        if not self.chosen or not self.rejected:
            return {}
        start = self.metrics(before, before, config)
        drawn = {name: [(0, start[name]), *curves.get(name, [])] for name in _DRAWN}
        examples = [
            {
                "prompt": tokenizer.decode(completion.prompt),
                "completion": tokenizer.decode(completion.completion[:-1]),
                "preference": side,
                "before": round(earlier, 2),
                "after": round(later, 2),
                "change": round(later - earlier, 2),
            }
            for group in zip(
                self._side("chosen", self.chosen, before.chosen_N, after.chosen_N),
                self._side("rejected", self.rejected, before.rejected_M, after.rejected_M),
                strict=False,
            )
            for side, completion, earlier, later in group
        ]
        return {
            "Validation completions": [
                page.note("Means over the validation completions at each evaluation."),
                _chart(drawn),
            ],
            "Log-probability of the first validation completions, in nats": page.table(examples),
        }

    @staticmethod
    def _side(
        name: str, completions: Sequence[PromptCompletion], before_S: Tensor, after_S: Tensor
    ) -> list[tuple[str, PromptCompletion, float, float]]:
        return [(name, *row) for row in zip(completions[:EXAMPLES], before_S.tolist(), after_S.tolist(), strict=False)]


@dataclass(frozen=True)
class ValidationScores:
    """Log-probabilities, summed over counted tokens, and the numbers of counted tokens."""

    chosen_N: Tensor
    chosen_tokens_N: Tensor
    rejected_M: Tensor
    rejected_tokens_M: Tensor

    def ratios(self, before: ValidationScores, config: DPOConfig) -> tuple[Tensor, Tensor]:
        """Return log-ratios to ``before`` or, without a reference, log-probabilities; rewards are beta times these."""
        chosen_N, rejected_M = self.chosen_N, self.rejected_M
        if config.uses_reference:
            chosen_N, rejected_M = chosen_N - before.chosen_N, rejected_M - before.rejected_M
        if config.normalises_length:
            return chosen_N / self.chosen_tokens_N, rejected_M / self.rejected_tokens_M
        return chosen_N, rejected_M


def check_fall(metrics: dict[str, float], config: DPOConfig) -> str:
    """Return a warning if chosen completions became unlikely, else an empty string.

    Raises ``DataError`` if the fall exceeds ``config.max_chosen_fall``.
    """
    fall = -metrics.get("validation_chosen_change", 0.0)
    advice = "raise dpo.rpo_alpha or lower the learning rate"
    if config.max_chosen_fall is not None and fall > config.max_chosen_fall:
        raise DataError(
            f"dpo: the log-probability of chosen validation completions fell by {fall:.2f} nats, expected at most "
            f"dpo.max_chosen_fall = {config.max_chosen_fall}: the margin grows by making both completions unlikely; "
            f"{advice}"
        )
    if metrics.get("chosen_fall_alarm"):
        return f"the log-probability of chosen validation completions fell by {fall:.2f} nats; {advice}"
    return ""


_DRAWN = {
    "validation_margin": ("margin, nats", "margin"),
    "validation_chosen_logprob": ("log-probability, nats", "chosen"),
    "validation_rejected_logprob": ("log-probability, nats", "rejected"),
    "validation_preference_accuracy": ("accuracy", "by reward"),
    "validation_likelihood_accuracy": ("accuracy", "by likelihood"),
}
"""Panel and line label of each plotted metric."""


def _chart(curves: dict[str, Curve]) -> page.Fragment:
    """Plot margin, log-probabilities and accuracies over optimizer steps, one panel each."""
    panels: dict[str, list[charts.Line]] = {}
    for name, (panel, label) in _DRAWN.items():
        members = panels.setdefault(panel, [])
        members.append(charts.Line.of_points(curves[name], label, colour=charts.COLOURS[len(members)]))
    return charts.svg(charts.lines(panels, "step"))
