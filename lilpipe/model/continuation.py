"""Initialization from a checkpoint (continued pretraining): which models and vocabularies are compatible.

Token ids must keep their meaning, so the vocabulary must be the checkpoint's or extend it: a tokenizer whose
``tokenizer.base`` is the checkpoint's has the same ids, followed by its added special tokens. Sequence length and RoPE
base may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.hub import copy_into, read_model_config, read_tensors
from lilpipe.tokenizer.encoding import BytePairTokenizer, ImportedTokenizer, Tokenizer

MAY_DIFFER = ("architecture", "dropout", "rope_theta", "max_seq_len")
"""Settings that the weights do not depend on. GPT-2 has position embeddings, so its ``max_seq_len`` may not differ."""

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of the decoder with a row per token."""


def embeddings_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of tensors with a row per token."""
    return config.embeddings if isinstance(config, BackendConfig) else EMBEDDINGS


@torch.no_grad()
def start_from(into: Mapping[str, Tensor], directory: Path, *, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Copy a checkpoint's weights into an initialized model, one tensor at a time.

    ``into`` is as in ``load_weights``. Rows of tokens that the checkpoint does not have get the mean of its rows, so
    that no new token is more likely than others at first (Hewitt 2021).
    Raises ``ConfigError`` for a model of another shape, ``ArtifactError`` for an incompatible vocabulary.
    """
    check_shape(config, directory)
    check_vocabulary(tokenizer, directory)
    for name, tensor in read_tensors(directory):
        target: Any = into.get(name)
        if target is not None and name in embeddings_of(config):
            rows = target.full_tensor() if hasattr(target, "full_tensor") else target.clone()
            shared = min(len(rows), len(tensor))
            rows[:shared] = tensor[:shared]
            rows[shared:] = tensor[:shared].double().mean(0)
            tensor = rows
        copy_into(target, tensor)


def check_shape(config: ModelConfig, directory: Path) -> None:
    """Raise ``ConfigError`` naming the settings in which a model differs from the checkpoint.

    The config of a class of transformers is the checkpoint's.
    """
    if isinstance(config, BackendConfig):
        return
    stored, _ = read_model_config(directory)
    free = [name for name in MAY_DIFFER if name != "max_seq_len" or config.position_embedding == "rope"]
    wanted, got = stored.model_dump(exclude=set(free)), config.model_dump(exclude=set(free))
    for section in (wanted["moe"], got["moe"]):
        if section:
            del section["bias_update_rate"]
    if config.mla is not None:
        del wanted["num_kv_heads"], got["num_kv_heads"]
    if differing := [name for name in wanted if wanted[name] != got[name]]:
        name = differing[0]
        raise ConfigError(
            f"pretrain.model.{name}: got {got[name]!r}, expected {wanted[name]!r} as in the checkpoint {directory}; "
            f"set {', '.join(differing)} to the checkpoint's values, or train without it"
        )


def check_vocabulary(tokenizer: Tokenizer, directory: Path) -> None:
    """Raise ``ArtifactError`` if token ids have other meanings than in the checkpoint."""
    stored = Tokenizer.load(directory)
    if not _same_text_ids(tokenizer, stored):
        raise ArtifactError(
            f"{directory}: got a vocabulary of {stored.vocab_size:,} tokens, expected that of the token shards, "
            f"{tokenizer.vocab_size:,} tokens, without special ones; tokenize with the checkpoint's tokenizer, or with "
            "one whose tokenizer.base is the checkpoint's and which adds no merges"
        )


def _same_text_ids(tokenizer: Tokenizer, stored: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids for all text; an imported one may have been extended by tiktoken."""
    if tokenizer.text_digest == stored.text_digest:
        return True
    if not (isinstance(tokenizer, BytePairTokenizer) and isinstance(stored, ImportedTokenizer)):
        return False
    try:
        ranks = stored.as_ranks()
    except (ValueError, LookupError, TypeError):
        return False
    return (ranks.ranks, ranks.pattern) == (tokenizer.ranks, tokenizer.pattern)
