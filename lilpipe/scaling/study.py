"""The runs that a law is fitted to, what it says of a larger one, and how it did on the largest that was held back."""

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
from lilpipe.pipeline.runs import new_pipeline_run
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.scaling.depth import TOKENS_PER_PARAMETER
from lilpipe.scaling.law import Features, Law, check, fit, predict_interval
from lilpipe.store import Store


@dataclass(frozen=True)
class Run:
    """One run of pretraining, or one that is only planned."""

    num_layers: int
    parameters: int
    """Active for one token."""
    tokens: int
    flops: float
    """Model FLOPs of the whole run."""
    loss: float | None = None
    """The metric that the law is about; none where it was not run."""
    fingerprint: str = ""

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Prediction:
    """What the law says of a run."""

    run: Run
    loss: float
    interval: tuple[float, float] | None
    """Where the loss falls in 9 of 10 cases; none if there were too few runs to tell."""


@dataclass(frozen=True)
class Study:
    """A law and how far it can be trusted."""

    metric: str
    runs: tuple[Run, ...]
    """By FLOPs, the smallest first."""
    law: Law
    target: Prediction | None
    held_out: Prediction | None
    """The largest run as predicted from the others; none if these are too few."""

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def study(runs: Sequence[Run], *, metric: str, target: Run | None = None) -> Study:
    """Fit the law to ``runs``. Raises ``DataError`` if they are too few or too much alike."""
    ordered = tuple(sorted(runs, key=lambda run: run.flops))
    law = fit(features(ordered, like=ordered), _losses(ordered))
    try:
        held_out = predict(ordered[:-1], ordered[-1])
    except DataError:
        held_out = None
    return Study(metric, ordered, law, predict(ordered, target) if target else None, held_out)


def predict(runs: Sequence[Run], run: Run) -> Prediction:
    """What the law of ``runs`` says of another."""
    known, at = features(runs, like=runs), features([run], like=runs)
    loss = float(fit(known, _losses(runs)).predict(at)[0])
    return Prediction(run, loss, predict_interval(known, _losses(runs), at))


def features(runs: Sequence[Run], *, like: Sequence[Run]) -> Features:
    """The features of ``runs`` in which a law of the runs ``like`` is.

    Parameters and tokens, where these vary apart and the runs are more than that law's five unknowns; else FLOPs,
    which takes for granted that all runs are scaled alike.
    """
    counts = [{run.parameters for run in like}, {run.tokens for run in like}, tokens_per_parameter(like)]
    if len(like) > 5 and all(len(values) >= least for values, least in zip(counts, (3, 3, 2), strict=True)):
        return {"parameters": [float(run.parameters) for run in runs], "tokens": [float(run.tokens) for run in runs]}
    return {"FLOPs": [run.flops for run in runs]}


def tokens_per_parameter(runs: Sequence[Run]) -> list[float]:
    """The ratios there are, the least first; those within a tenth of each other count once."""
    ratios: list[float] = []
    for run in sorted(runs, key=lambda run: run.ratio):
        if not ratios or run.ratio > 1.1 * ratios[-1]:
            ratios.append(run.ratio)
    return ratios


def _losses(runs: Sequence[Run]) -> list[float]:
    return [run.loss for run in runs if run.loss is not None]


# --- where runs come from -----------------------------------------------------------------------------------------


def planned_run(config: PipelineConfig) -> Run:
    """The pretraining of a configuration, not run."""
    section, vocab_size = config.section(pretrain_step(config)), config.tokenizer.vocab_size
    tokens = sum((phase.stop - phase.first) * phase.batch_size * phase.seq_len for phase in section.resolved_phases)
    return _run(section.model, vocab_size, tokens, seq_len=section.seq_len)


def trained_runs(
    configs: Sequence[PipelineConfig], *, metric: str, store: Store, listeners: Sequence[Listener] = ()
) -> list[Run]:
    """Run the steps of each configuration up to pretraining; what is cached is not run again.

    Raises ``DataError`` before anything runs if no law could be fitted to these runs.
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
    """Every finished pretraining in the store on the same tokens as the newest.

    Of several with the same parameters and tokens the newest counts.
    """
    manifests = store.manifests("pretrain")
    if not manifests:
        raise DataError(f"scaling: {store.root} holds no finished pretraining; train some, with --depths 2,3,4,6")
    tokens = [entry.content_digest for entry in manifests[-1].inputs["tokens"]]
    alike = [m for m in manifests if [entry.content_digest for entry in m.inputs["tokens"]] == tokens]
    found = [finished_run(manifest, metric) for manifest in alike]
    return list({(run.parameters, run.tokens): run for run in found}.values())


def finished_run(manifest: Manifest, metric: str) -> Run:
    """The run that made a checkpoint. Raises ``ConfigError`` for a metric that it does not have."""
    if metric not in manifest.metrics:
        raise ConfigError(f"scaling: metric {metric!r}: there is no such metric; known: {', '.join(manifest.metrics)}")
    model = ModelConfig.model_validate(manifest.config["model"])
    # The vocabulary is what the parameters leave: tables have a column for each word.
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
    """The first step that pretrains."""
    for name, step in config.steps.items():
        if step.stage == "pretrain":
            return name
    raise ConfigError("scaling: no step of this configuration pretrains; add one of stage 'pretrain'")


def configurations(
    load: Callable[[dict[str, Any]], PipelineConfig], *, depths: Sequence[int], ratios: Sequence[float]
) -> list[PipelineConfig]:
    """A configuration for each depth and number of tokens a parameter; ``load`` takes further overrides."""
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
