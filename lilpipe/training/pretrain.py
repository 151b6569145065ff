"""Stage ``pretrain``: next-token training on token shards, from initial weights or from a checkpoint.

Tokens come from the corpus streams and the exercises in configured ratios; validation measures bits per byte of each
stream. One trainer supports every parallel layout; see ``lilpipe.parallel``.
"""

from __future__ import annotations

from lilpipe import distributed, page
from lilpipe.artifact import Artifact, Inputs, one_input, optional_input
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.backend import with_vocabulary
from lilpipe.model.continuation import start_from
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import read_model_config
from lilpipe.model.lora import add_adapters, start_adapters
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokens.data_phase_plan import open_loader, plan_data_phases
from lilpipe.tokens.loader import PretrainLoader
from lilpipe.tokens.shards import TokenShards
from lilpipe.tokens.trace import documents_of
from lilpipe.training import activation_checkpointing, compilation, precision
from lilpipe.training.budget import Budget, budget, planned_beside_actual
from lilpipe.training.finetune import export
from lilpipe.training.gauges import Gauges, peak_memory
from lilpipe.training.loop import train
from lilpipe.training.mixture_report import measure_mixture, mixture_section, unmet_shares
from lilpipe.training.model_limits import check_limits
from lilpipe.training.next_token import NextToken
from lilpipe.training.replica import Replica, TrainerModule
from lilpipe.training.training_report import write_report
from lilpipe.training.training_state import TrainingResult
from lilpipe.training.validation import Validation

DOCUMENTS_SHOWN = 20
"""Documents of a bad batch that the log lists."""


def run(config: PretrainConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train the model.

    Raises ``ConfigError`` if the mixture needs exercises that the shards do not have, ``DataError`` for too little
    text, ``ArtifactError`` if the shards do not match their tokenizer.
    """
    tokens = one_input(inputs, "tokens")
    shards = TokenShards.open(tokens.path)
    tokenizer = shards.tokenizer  # checked now, not after hours of training
    loader = open_loader(config, shards)
    planned = plan_data_phases(config, shards)
    for line in unmet_shares(planned):
        workspace.log(line)
    source = optional_input(inputs, "model")
    config, vocab_size = _with_stored_class(config, source, shards.vocab_size)
    if config.lora is not None:
        _check_adapters(source, shards.vocab_size)
    trainer_module, objective = build(config, vocab_size, loader)
    identity = {"tokens": tokens.content_digest}
    if source is not None:
        start_from(trainer_module.tensors(), source.path, config=config.model, tokenizer=tokenizer)
        identity["model"] = source.content_digest
    if config.lora is not None:
        for part in trainer_module.parts:
            assert isinstance(part, Transformer)
            start_adapters(part, config.lora, stage="pretrain")
    plan = _plan(config, vocab_size, workspace)
    gauges = Gauges(plan, objective)
    result = train(
        trainer_module,
        num_steps=config.num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=Validation(config, shards, tokenizer, workspace),
        eval_every=config.eval_every,
        milestones=[phase.stop for phase in config.resolved_phases],
        identity=identity,
        health=config.health,
        before_step=lambda step: _enter_phase(trainer_module, config, step),
        describe=lambda step: _describe(loader, step),
        gauges=gauges,
    )
    metrics = {
        **result.metrics,
        "train_loss": result.final_loss(),
        "tokens": float(result.num_tokens),
        "tokens_per_second": result.tokens_per_second,
        "mfu": gauges.mfu(result.tokens_per_second),
        "peak_memory_gib": peak_memory() / 2**30,
        "num_parameters": float(num_parameters(config.model, vocab_size)),
        "goodput": result.goodput,
        "skipped_steps": float(len(result.skipped)),
        **{f"seconds_{cause}": seconds for cause, seconds in result.time.items()},
        **measure_mixture(loader),
    }
    export(
        trainer_module,
        shards.tokenizer,
        workspace,
        source=source and source.path,
        config=trained_config(config),
    )
    if distributed.is_main():
        write_report(
            workspace,
            title="Pretraining",
            losses=result.losses,
            config=config,
            key_figures={
                name: value for name, value in metrics.items() if not name.startswith(("share_", "epochs_", "seconds_"))
            },
            sections={
                "Planned and actual": plan_section(plan, metrics, result),
                "Wall time by cause": time_section(result),
                "Mixture": mixture_section(planned, loader),
            },
        )
    return metrics


def build(config: PretrainConfig, vocab_size: int, loader: PretrainLoader) -> tuple[TrainerModule, NextToken]:
    """Return the initialized model as this worker holds it, and its objective."""
    assert config.seed is not None
    device = distributed.device()
    precision.check(config, device)
    if config.layout.replicate < config.num_workers:
        from lilpipe.parallel.mesh import Mesh
        from lilpipe.training.build_sharded import parallelize  # experimental modules of torch

        mesh = Mesh(config.layout)
        objective = NextToken(config, loader, rank=mesh.data_rank, world_size=config.layout.data, device=device)
        model = parallelize(
            config,
            config.model,
            vocab_size,
            batches=objective.batches,
            loss=objective.loss,
            mesh=mesh,
            intra_document_masking=config.intra_document_masking,
            compiled=compilation.is_wanted(config, vocab_size),
            stage="pretrain",
        )
        return model, objective
    model = Transformer(config.model, vocab_size)
    if not isinstance(config.model, BackendConfig):
        model.init_weights(config.seed)
    model = model.to(device)
    if config.lora is not None:
        add_adapters(model, config.lora, seed=config.seed, stage="pretrain")
    activation_checkpointing.apply(model, config.activation_checkpointing)
    if config.precision == "fp8":
        precision.convert_fp8(model)
    if compilation.is_wanted(config, vocab_size):
        compilation.compile_blocks(model)
    rank, world_size = distributed.rank(), distributed.world_size()
    objective = NextToken(config, loader, rank=rank, world_size=world_size, device=device)
    return Replica(model, objective.loss_of_replica, accumulation_steps=objective.accumulation_steps), objective


def _with_stored_class(config: PretrainConfig, source: Artifact | None, vocab_size: int) -> tuple[PretrainConfig, int]:
    """Return config and vocabulary size, with the checkpoint's model instead of `model` if transformers computes it.

    `model.max_seq_len` stays the default of the sequence length. Raises ``ConfigError`` for what the class cannot do.
    """
    stored, num_stored = (None, vocab_size) if source is None else read_model_config(source.path)
    if not isinstance(stored, BackendConfig):
        return config, vocab_size
    check_limits(config, class_name=stored.class_name, stage="pretrain")
    for phase in config.resolved_phases:
        if phase.seq_len > stored.max_seq_len:
            raise ConfigError(
                f"pretrain.{phase.setting('seq_len')}: got {phase.seq_len}, expected at most {stored.max_seq_len} for "
                f"{stored.class_name}; set it to that"
            )
        if phase.rope_theta != config.model.rope_theta:
            raise ConfigError(
                f"pretrain.{phase.setting('rope_theta')}: got {phase.rope_theta}, expected no other base for "
                f"{stored.class_name}; remove it"
            )
    if vocab_size > num_stored:
        stored, num_stored = with_vocabulary(stored, vocab_size), vocab_size
    changes = {"model": stored, "seq_len": config.seq_len or config.model.max_seq_len}
    return config.model_copy(update=changes), num_stored


def _check_adapters(source: Artifact | None, vocab_size: int) -> None:
    """Raise ``ConfigError`` if adapters would leave weights at their initial values."""
    if source is None:
        raise ConfigError(
            "pretrain.lora: got adapters for initial weights, expected a checkpoint that they adapt; give the step an "
            "input `model`, or remove pretrain.lora"
        )
    if (stored := read_model_config(source.path)[1]) < vocab_size:
        raise ConfigError(
            f"pretrain.lora: got {vocab_size} tokens, expected the {stored} of the checkpoint {source.path}: adapters "
            "do not train the embeddings of new tokens; remove pretrain.lora"
        )


def _enter_phase(trainer_module: TrainerModule, config: PretrainConfig, step: int) -> None:
    """Set the step's RoPE base, and a dropout seed that does not depend on the worker."""
    assert config.seed is not None
    for part in trainer_module.parts:
        assert isinstance(part, Transformer)
        part.set_rope(config.phase_of(step).rope_theta)
        part.set_dropout_seed(config.seed, step)


def trained_config(config: PretrainConfig) -> ModelConfig:
    """Return the model's config with its final RoPE base."""
    return config.model.model_copy(update={"rope_theta": config.resolved_phases[-1].rope_theta})


def _describe(loader: PretrainLoader, step: int) -> str:
    """Return the documents of a batch."""
    documents = documents_of(loader, step)
    more = f" and {len(documents) - DOCUMENTS_SHOWN} more" if len(documents) > DOCUMENTS_SHOWN else ""
    return ", ".join(documents[:DOCUMENTS_SHOWN]) + more


def _plan(config: PretrainConfig, vocab_size: int, workspace: Workspace) -> Budget | None:
    """Return the estimate of the run on the main worker; None on a device or for a model with unknown peak."""
    if not distributed.is_main() or isinstance(config.model, BackendConfig):
        return None
    try:
        return budget(config, vocab_size)
    except ConfigError as error:
        workspace.log(f"MFU is not shown: {error}")
        return None


def plan_section(plan: Budget | None, metrics: Metrics, result: TrainingResult) -> list[page.Fragment]:
    """Return a table of the estimate and the measured values."""
    if plan is None:
        return [page.note("There is no estimate for an unknown device.")]
    actual = {
        "num_parameters": metrics["num_parameters"],
        "tokens": metrics["tokens"],
        "tokens_per_second": metrics["tokens_per_second"],
        "seconds": result.seconds,
        "mfu": metrics["mfu"],
        "cost": plan.num_devices * result.seconds / 3600 * plan.price_per_hour,
        "peak_memory_bytes": metrics["peak_memory_gib"] * 2**30,
    }
    note = f"Planned for {plan.num_devices} x {plan.device.name} ({plan.device.source}) at an MFU of {plan.mfu:.0%}."
    if plan.device.name == "cpu":
        note += " The planned memory is that of tensors; the actual memory includes the process and its libraries."
    return [page.table(planned_beside_actual(plan, actual)), page.note(note)]


def time_section(result: TrainingResult) -> list[page.Fragment]:
    """Return a table of wall time by cause, over all attempts."""
    total = sum(result.time.values())
    rows: list[dict[str, page.Cell]] = [
        {"cause": cause, "seconds": seconds, "% of all": 100 * seconds / total}
        for cause, seconds in result.time.items()
        if seconds
    ]
    note = f"Goodput, the share of wall time in useful steps: {result.goodput:.1%}."
    return [page.table(rows), page.note(note)]


STAGE = Stage(
    name="pretrain",
    output="Checkpoint",
    config=PretrainConfig,
    run=run,
    inputs={"tokens": "TokenShards"},
    optional_inputs={"model": "Checkpoint", "adapter": "Checkpoint"},
    distributed=True,
    main_metric="validation_bits_per_byte_corpus",
)
