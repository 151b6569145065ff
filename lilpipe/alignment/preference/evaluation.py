"""What training on preferences does to held-out completions: metrics, the alarm, curves and examples.

Dimensions: N chosen completions, M rejected ones (of pairs as many), S completions of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lilpipe import report
from lilpipe.alignment.preference.data import Packer, PromptCompletion
from lilpipe.alignment.preference.objective import positive_ratio
from lilpipe.config.dpo import DPOConfig
from lilpipe.errors import DataError
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.curves import Curve
from lilpipe.training.precision import autocast

CHOSEN_FALL_ALARM = 1.0
"""Nats. A fall of the held-out chosen completions' mean log-probability by more than this is reported: DPO can widen
its margin while both completions become unlikely, and accuracy falls with them."""
COMPLETIONS_AT_ONCE = 64
EXAMPLES = 6


@torch.inference_mode()
def score_completions(
    model: Transformer, completions: Sequence[PromptCompletion], packer: Packer, config: DPOConfig
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion and the number of tokens that count in it [S], on the CPU."""
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
    """Held-out completions; ``paired`` if the chosen and the rejected one at a place belong to one prompt."""

    chosen: Sequence[PromptCompletion]
    rejected: Sequence[PromptCompletion]
    paired: bool

    def score(self, model: Transformer, packer: Packer, config: DPOConfig) -> ValidationScores:
        """Log-probabilities of all."""
        return ValidationScores(
            *score_completions(model, self.chosen, packer, config),
            *score_completions(model, self.rejected, packer, config),
        )

    def metrics(self, now: ValidationScores, before: ValidationScores, config: DPOConfig) -> dict[str, float]:
        """Metrics of a model, ``before`` those of the one that training began with; none where there are no
        completions.

        ``validation_preference_accuracy`` is the share of pairs in which the chosen completion has the higher reward
        (ties count half: against itself as the reference, a model has 0.5), ``validation_likelihood_accuracy`` the
        share in which it is the likelier one. Without pairs, each chosen completion is compared with each rejected one.
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
        """Of all comparisons."""
        return chosen_N - rejected_M if self.paired else (chosen_N[:, None] - rejected_M).flatten()

    def sections(
        self,
        tokenizer: Tokenizer,
        curves: dict[str, Curve],
        *,
        before: ValidationScores,
        after: ValidationScores,
        config: DPOConfig,
    ) -> dict[str, str]:
        """For the report: curves over the steps, and the first completions with their log-probabilities."""
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
            "Held-out completions": report.note("Means over held-out completions, after each part of the training.")
            + report.figure(_figure(drawn)),
            "Log-probability of the first held-out completions, in nats": report.table(examples),
        }

    @staticmethod
    def _side(
        name: str, completions: Sequence[PromptCompletion], before_S: Tensor, after_S: Tensor
    ) -> list[tuple[str, PromptCompletion, float, float]]:
        return [(name, *row) for row in zip(completions[:EXAMPLES], before_S.tolist(), after_S.tolist(), strict=False)]


@dataclass(frozen=True)
class ValidationScores:
    """Log-probabilities, sums over the tokens that count, and the numbers of these."""

    chosen_N: Tensor
    chosen_tokens_N: Tensor
    rejected_M: Tensor
    rejected_tokens_M: Tensor

    def ratios(self, before: ValidationScores, config: DPOConfig) -> tuple[Tensor, Tensor]:
        """What rewards are made of: log-ratios to ``before`` where the loss has a reference."""
        chosen_N, rejected_M = self.chosen_N, self.rejected_M
        if config.uses_reference:
            chosen_N, rejected_M = chosen_N - before.chosen_N, rejected_M - before.rejected_M
        if config.normalises_length:
            return chosen_N / self.chosen_tokens_N, rejected_M / self.rejected_tokens_M
        return chosen_N, rejected_M


def check_fall(metrics: dict[str, float], config: DPOConfig) -> str:
    """A warning where chosen completions have become unlikely. Raises ``DataError`` beyond
    ``config.max_chosen_fall``.
    """
    fall = -metrics.get("validation_chosen_change", 0.0)
    advice = "raise dpo.rpo_alpha or lower the learning rate"
    if config.max_chosen_fall is not None and fall > config.max_chosen_fall:
        raise DataError(
            f"dpo: the log-probability of held-out chosen completions fell by {fall:.2f} nats, expected at most "
            f"dpo.max_chosen_fall = {config.max_chosen_fall}: the margin is won by making both completions unlikely; "
            f"{advice}"
        )
    if metrics.get("chosen_fall_alarm"):
        return f"the log-probability of held-out chosen completions fell by {fall:.2f} nats; {advice}"
    return ""


_DRAWN = {
    "validation_margin": ("margin, nats", "margin"),
    "validation_chosen_logprob": ("log-probability, nats", "chosen"),
    "validation_rejected_logprob": ("log-probability, nats", "rejected"),
    "validation_preference_accuracy": ("accuracy", "by reward"),
    "validation_likelihood_accuracy": ("accuracy", "by likelihood"),
}
"""Metric to its panel and its name there."""


def _figure(curves: dict[str, Curve]) -> Figure:
    """A panel each for margin, log-probabilities and accuracies, over the steps."""
    panels = list(dict.fromkeys(panel for panel, _ in _DRAWN.values()))
    picture = Figure(figsize=(9, 2.6), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = picture.add_subplot(1, len(panels), number)
        members = [(label, curves[name]) for name, (title, label) in _DRAWN.items() if title == panel]
        for (label, curve), colour in zip(members, report.COLOURS, strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.4, marker="o", markersize=3, label=label)
        if len(members) > 1:
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(panel, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    return picture
