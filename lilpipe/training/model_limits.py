"""What a model does not support in fine-tuning, said before its weights are loaded."""

from __future__ import annotations

from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel_checks import check_micro_batches, check_model
from lilpipe.config.training import ParallelSection
from lilpipe.errors import ConfigError


def check_limits(section: ParallelSection, *, class_name: str, stage: str) -> None:
    """Raise ``ConfigError`` naming the setting of ``stage`` that a class of transformers does not support."""
    layout = section.layout
    got = {
        "parallel.tensor": (layout.tensor, 1),
        "parallel.pipeline": (layout.pipeline, 1),
        "parallel.context": (layout.context, 1),
        "precision": (section.precision, "fp32" if section.precision == "fp32" else "bf16"),
        "compile": (bool(section.compile), False),
        "neftune_noise_alpha": (getattr(section, "neftune_noise_alpha", 0.0), 0.0),
        "lora.lora_dropout": (0.0 if section.lora is None else section.lora.lora_dropout, 0.0),
        "lora.load_in_4bit": (section.lora is not None and section.lora.load_in_4bit, False),
    }
    for name, (value, expected) in got.items():
        if value != expected:
            raise ConfigError(
                f"{stage}.{name}: got {value}, expected {expected} for {class_name}, a class of transformers that the "
                f"decoder does not compute; set {stage}.{name} to {expected}"
            )


def check_division(section: ParallelSection, model: ModelConfig, *, stage: str) -> None:
    """Raise ``ConfigError`` if the workers of a fine-tuning ``stage`` cannot divide the model or its batches."""
    try:
        check_model(section.parallel, section.layout, model, activation_checkpointing=section.activation_checkpointing)
        check_micro_batches(section.parallel, section.accumulation_steps)
    except ValueError as error:
        raise ConfigError(f"{stage}: {error}") from error
    if section.layout.context > 1:
        raise ConfigError(
            f"{stage}.parallel.context: got {section.layout.context}, expected 1: only pretraining splits sequences"
        )
