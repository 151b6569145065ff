"""Mixture of a pretraining run: metrics, log lines and report tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lilpipe import page
from lilpipe.stage import Metrics
from lilpipe.tokens.data_phase import DataPhase
from lilpipe.tokens.data_phase_plan import PlannedDataPhase
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.mixture import largest_total


def measure_mixture(loader: PretrainLoader) -> Metrics:
    """Return each stream's share of the training tokens, and its number of epochs."""
    targets = {name: loader.num_targets(name) for name in loader.streams}
    metrics: Metrics = {}
    for name, count in targets.items():
        metrics[f"share_{name}"] = count / sum(targets.values())
        metrics[f"epochs_{name}"] = loader.epochs(name)
    return metrics


def unmet_shares(planned: Sequence[PlannedDataPhase]) -> Iterator[str]:
    """Yield a line for each stream that does not reach its requested share."""
    for data_phase in planned:
        where = f" from step {data_phase.phases[0].first:,}" if len(planned) > 1 else ""
        for name, part in data_phase.parts.items():
            if part.reason:
                reached = f"{part.reached:.1%} of the requested {part.asked:.1%}"
                yield f"mixture{where}: {name} gives {reached}: {part.reason}"


def mixture_section(planned: Sequence[PlannedDataPhase], loader: PretrainLoader) -> list[page.Fragment]:
    """Return a table of requested and reached shares, with reasons, and the largest token count for the weights.

    With phases, there is a table per sequence length and mixture; epochs count up to the end of each.
    """
    parts = []
    done = dict.fromkeys(loader.streams, 0.0)
    for plan, data_phase in zip(planned, loader.data_phases, strict=True):
        for name, stream in loader.streams.items():
            done[name] += data_phase.num_targets(name) / stream.num_tokens
        if len(planned) > 1:
            steps = f"Steps {plan.phases[0].first:,} to {plan.phases[-1].stop - 1:,}"
            parts.append(page.note(f"{steps}, sequences of {plan.seq_len:,} tokens:"))
        parts.append(page.table(_rows(plan, loader, data_phase, epochs=done)))
    if len(planned) == 1 and planned[0].parts:
        parts.append(page.note(_reach(planned[0])))
    return parts


def _rows(
    plan: PlannedDataPhase, loader: PretrainLoader, data_phase: DataPhase, *, epochs: dict[str, float]
) -> list[dict[str, page.Cell]]:
    targets = {name: data_phase.num_targets(name) for name in loader.streams}
    corpus, parts = 1 - plan.exercise_ratio, plan.parts
    return [
        {
            "stream": name,
            "tokens": loader.shards.stream(name, "train").num_tokens,
            "% requested": 100 * (parts[name].asked * corpus if name in parts else plan.exercise_ratio),
            "% reached": 100 * targets.get(name, 0.0) / sum(targets.values()),
            "epochs": epochs.get(name, 0.0),
            "max epochs": parts[name].max_epochs if name in parts else "",
            "reason": parts[name].reason if name in parts else "",
        }
        for name in loader.shards.streams
        if name in parts or targets.get(name)
    ]


def _reach(plan: PlannedDataPhase) -> str:
    weights = {name: part.asked for name, part in plan.parts.items()}
    limits = {name: part.max_epochs for name, part in plan.parts.items()}
    tokens = {name: part.tokens for name, part in plan.parts.items()}
    most = largest_total(weights, tokens, limits) / (1 - plan.exercise_ratio)
    return f"Within the epoch limits, these weights are possible up to {most:,.0f} training tokens."
