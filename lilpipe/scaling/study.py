"""Scaling study: the runs, the law fitted to them, its prediction of a larger run, and a check on the largest run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lilpipe.artifact import Artifact, Manifest
from lilpipe.config.model import ModelConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.flops import num_active_parameters, num_parameters, training_flops_per_token
from lilpipe.pipeline.run import Listener, run_step
from lilpipe.pipeline.run_names import new_pipeline_run
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.scaling.depth import TOKENS_PER_PARAMETER
from lilpipe.scaling.law import Features, Law, check, fit, predict_interval
from lilpipe.store import Store


@dataclass(frozen=True)
class Run:
    """A pretraining run, finished or planned."""

    num_layers: int
    parameters: int
    """Active parameters (those used for one token)."""
    tokens: int
    flops: float
    """Model FLOPs of the whole run."""
    loss: float | None = None
    """Value of the metric that the law predicts; ``None`` for a planned run."""
    fingerprint: str = ""

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Prediction:
    """The law's prediction for a run."""

    run: Run
    loss: float
    interval: tuple[float, float] | None
    """90 % prediction interval of the loss; ``None`` if there are too few runs."""


@dataclass(frozen=True)
class Study:
    """A law and the evidence for it."""

    metric: str
    runs: tuple[Run, ...]
    """In order of FLOPs, smallest first."""
    law: Law
    target: Prediction | None
    held_out: Prediction | None
    """Prediction of the largest run from the others; ``None`` if there are too few."""

    def as_json(self) -> dict[str, Any]:
        """Return the study as plain values."""
        return asdict(self)


def study(runs: Sequence[Run], *, metric: str, target: Run | None = None) -> Study:
    """Fit the law to ``runs``. Raises ``DataError`` if they are too few or too similar."""
    ordered = tuple(sorted(runs, key=lambda run: run.flops))
    law = fit(features(ordered, like=ordered), _losses(ordered))
    try:
        held_out = predict(ordered[:-1], ordered[-1])
    except DataError:
        held_out = None
    return Study(metric, ordered, law, predict(ordered, target) if target else None, held_out)


def predict(runs: Sequence[Run], run: Run) -> Prediction:
    """Return the prediction for ``run`` by the law fitted to ``runs``."""
    known, at = features(runs, like=runs), features([run], like=runs)
    loss = float(fit(known, _losses(runs)).predict(at)[0])
    return Prediction(run, loss, predict_interval(known, _losses(runs), at))


def features(runs: Sequence[Run], *, like: Sequence[Run]) -> Features:
    """Return the features of ``runs`` for a law fitted to the runs ``like``.

    These are parameters and tokens if both vary independently and there are more runs than that law's five unknowns.
    Otherwise FLOPs, which assumes that all runs are scaled alike.
    """
    counts = [{run.parameters for run in like}, {run.tokens for run in like}, tokens_per_parameter(like)]
    if len(like) > 5 and all(len(values) >= least for values, least in zip(counts, (3, 3, 2), strict=True)):
        return {"parameters": [float(run.parameters) for run in runs], "tokens": [float(run.tokens) for run in runs]}
    return {"FLOPs": [run.flops for run in runs]}


def tokens_per_parameter(runs: Sequence[Run]) -> list[float]:
    """Return the distinct ratios of tokens to parameters, ascending; ratios within 10 % of each other count once."""
    ratios: list[float] = []
    for run in sorted(runs, key=lambda run: run.ratio):
        if not ratios or run.ratio > 1.1 * ratios[-1]:
            ratios.append(run.ratio)
    return ratios


def _losses(runs: Sequence[Run]) -> list[float]:
    return [run.loss for run in runs if run.loss is not None]


# --- where runs come from -----------------------------------------------------------------------------------------


def planned_run(config: PipelineConfig) -> Run:
    """Return the pretraining run of a configuration, without running it."""
    section, vocab_size = config.section(pretrain_step(config)), config.tokenizer.vocab_size
    tokens = sum((phase.stop - phase.first) * phase.batch_size * phase.seq_len for phase in section.resolved_phases)
    return _run(section.model, vocab_size, tokens, seq_len=section.seq_len)


def trained_runs(
    configs: Sequence[PipelineConfig], *, metric: str, store: Store, listeners: Sequence[Listener] = ()
) -> list[Run]:
    """Run the steps of each configuration up to pretraining; cached steps are not run again.

    Raises ``DataError`` before anything runs if these runs do not determine a law.
    """
    planned = [planned_run(config) for config in configs]
    check(features(planned, like=planned))
    runs = []
    for config in configs:
        last = pretrain_step(config)
        steps = list(config.steps)[: list(config.steps).index(last) + 1]
        for step in steps:
            check_wiring(config, step)
        pipeline_run, artifact = new_pipeline_run(config), None
        for step in steps:
            artifact, _ = run_step(config, step, store=store, pipeline_run=pipeline_run, listeners=listeners)
        assert isinstance(artifact, Artifact)
        runs.append(finished_run(artifact.manifest, metric))
    return runs


def stored_runs(store: Store, *, metric: str) -> list[Run]:
    """Return the finished pretraining runs in the store on the same tokens as the newest run.

    Of several runs with the same parameters and tokens, the newest counts. Raises ``DataError`` if there is none.
    """
    manifests = store.manifests("pretrain")
    if not manifests:
        raise DataError(f"scaling: {store.root} contains no finished pretraining run; train some with --depths 2,3,4,6")
    tokens = [entry.content_digest for entry in manifests[-1].inputs["tokens"]]
    alike = [m for m in manifests if [entry.content_digest for entry in m.inputs["tokens"]] == tokens]
    found = [finished_run(manifest, metric) for manifest in alike]
    return list({(run.parameters, run.tokens): run for run in found}.values())


def finished_run(manifest: Manifest, metric: str) -> Run:
    """Return the run that made a checkpoint. Raises ``ConfigError`` if it has no such metric."""
    if metric not in manifest.metrics:
        raise ConfigError(f"scaling: metric {metric!r}: there is no such metric; known: {', '.join(manifest.metrics)}")
    model = ModelConfig.model_validate(manifest.config["model"])
    # The vocabulary size follows from the number of parameters: embedding tables have one row per token.
    per_word = num_parameters(model, 1) - num_parameters(model, 0)
    vocab_size = round((manifest.metrics["num_parameters"] - num_parameters(model, 0)) / per_word)
    tokens = round(manifest.metrics["tokens"])
    return _run(
        model,
        vocab_size,
        tokens,
        seq_len=manifest.config["seq_len"],
        loss=manifest.metrics[metric],
        fingerprint=manifest.fingerprint,
    )


def _run(
    model: ModelConfig,
    vocab_size: int,
    tokens: int,
    *,
    seq_len: int | None,
    loss: float | None = None,
    fingerprint: str = "",
) -> Run:
    return Run(
        num_layers=model.num_layers,
        parameters=num_active_parameters(model, vocab_size),
        tokens=tokens,
        flops=float(tokens * training_flops_per_token(model, vocab_size, seq_len=seq_len)),
        loss=loss,
        fingerprint=fingerprint,
    )


def pretrain_step(config: PipelineConfig) -> str:
    """Return the name of the first pretraining step."""
    for name, step in config.steps.items():
        if step.stage == "pretrain":
            return name
    raise ConfigError("scaling: no step of this configuration pretrains; add a step of stage 'pretrain'")


def configurations(
    load: Callable[[dict[str, Any]], PipelineConfig], *, depths: Sequence[int], ratios: Sequence[float]
) -> list[PipelineConfig]:
    """Return a configuration for each depth and tokens-per-parameter ratio; ``load`` applies overrides."""
    found = []
    for depth in depths:
        config = load({"depth": depth})
        for ratio in ratios:
            if ratio == TOKENS_PER_PARAMETER:
                found.append(config)
                continue
            num_steps = max(1, round(config.pretrain.num_steps * ratio / TOKENS_PER_PARAMETER))
            found.append(load({"depth": depth, "pretrain.num_steps": num_steps}))
    return found
