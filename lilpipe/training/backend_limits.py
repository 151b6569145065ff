"""What cannot be trained with a class of transformers (``lilpipe.model.backend``), said before weights are loaded."""

from __future__ import annotations

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
        "lora": ("adapters" if section.lora else "none", "none"),
    }
    for name, (value, expected) in got.items():
        if value != expected:
            raise ConfigError(
                f"{stage}.{name}: got {value}, expected {expected} for {class_name}, a class of transformers that the "
                f"decoder does not compute; set {stage}.{name} to {expected}"
            )
