"""Models that are sampled from or scored with, and not trained."""

from __future__ import annotations

from pathlib import Path

from lilpipe import distributed
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer


def load_frozen(directory: Path) -> tuple[Transformer, Tokenizer]:
    """Load a model on this process's device, and let oneDNN multiply where it is faster.

    Frozen, so that the decoder need not copy its matrices (``fused``). Raises ``ArtifactError`` as ``load_model``.
    """
    distributed.use_onednn()
    model, tokenizer = load_model(directory)
    return model.to(distributed.device()).requires_grad_(False), tokenizer
