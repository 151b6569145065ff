"""Models as directories in Hugging Face's Llama layout.

``config.json``, ``model.safetensors``, ``generation_config.json`` and the tokenizer's files: what ``transformers``
and vLLM load is what every stage here reads and writes, so that nothing is ever converted. Weights are safetensors,
never pickles. The same weights give the same bytes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lilpipe.artifact import write_atomically
from lilpipe.config import ModelConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.transformer import Transformer
from lilpipe.overrides import explain
from lilpipe.tokenizer.encoding import TOKENIZER_FILES, Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, GENERATION_FILE, *TOKENIZER_FILES)
"""All that ``save_model`` writes."""

_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our names to LlamaConfig's."""

_REQUIRED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What a config.json must say, where it says anything, for our decoder to compute the same."""


def save_model(model: Transformer, tokenizer: Tokenizer, directory: Path) -> None:
    """Write model and tokenizer in Hugging Face layout, each file atomically; equal weights give equal bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write_bytes(directory / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    special = _special_ids(tokenizer)
    write_atomically(directory / GENERATION_FILE, _json(special))
    write_atomically(directory / CONFIG_FILE, _json({**_llama_config(model), **special}))


def load_model(directory: Path) -> tuple[Transformer, Tokenizer]:
    """The model, on the CPU in evaluation mode, and its tokenizer.

    Raises ``ArtifactError`` naming file and key if the directory holds no Llama checkpoint that this decoder computes
    exactly.
    """
    config, vocab_size = read_model_config(directory)
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}); the stage must run again") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Transformer(config, vocab_size).state_dict().items()}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    for name in sorted(expected.keys() | weights.keys()):
        got = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name]) if name in expected else "nothing"
        if got != wanted:
            raise ArtifactError(f"{path}: {name}: got {got}, expected {wanted} by {CONFIG_FILE}")
    model = Transformer(config, vocab_size)
    model.load_state_dict(weights)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > vocab_size:
        raise ArtifactError(
            f"{directory / CONFIG_FILE}: vocab_size: got {vocab_size}, expected at least the tokenizer's "
            f"{tokenizer.vocab_size}; model and tokenizer do not belong together"
        )
    return model.eval(), tokenizer


def read_model_config(directory: Path) -> tuple[ModelConfig, int]:
    """The shape and the vocabulary size that ``config.json`` states. Raises ``ArtifactError`` naming the key."""
    path = directory / CONFIG_FILE
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); the directory holds no checkpoint") from error
    if not isinstance(stated, dict):
        raise ArtifactError(f"{path}: got a JSON {type(stated).__name__}, expected an object")
    for key, expected in _REQUIRED.items():
        if stated.get(key, None if key == "model_type" else expected) != expected:
            raise ArtifactError(f"{path}: {key}: got {stated.get(key)!r}, expected {expected!r}")
    values = {ours: stated[theirs] for ours, theirs in _KEYS.items() if theirs in stated}
    for ours, theirs in _KEYS.items():
        if ours not in values:
            raise ArtifactError(f"{path}: {theirs}: missing")
    try:
        config = ModelConfig(**values, rope_theta=_rope_theta(stated, path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain(error)}") from error
    if stated.get("head_dim") not in (None, config.head_size):
        raise ArtifactError(f"{path}: head_dim: got {stated['head_dim']}, expected {config.head_size}")
    vocab_size = stated.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ArtifactError(f"{path}: vocab_size: got {vocab_size!r}, expected a positive whole number")
    return config, vocab_size


def _rope_theta(stated: dict[str, Any], path: Path) -> Any:
    """Base of the rotary embedding: under ``rope_parameters`` since transformers 5, at the top before."""
    parameters = stated.get("rope_parameters") or {}
    scaling = stated.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ArtifactError(f"{path}: rope_type: got {kind!r}, expected 'default'")
    theta = parameters.get("rope_theta", stated.get("rope_theta"))
    if theta is None:
        raise ArtifactError(f"{path}: rope_theta: missing")
    return theta


def _llama_config(model: Transformer) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        **_REQUIRED,
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "vocab_size": model.vocab_size,
        "head_dim": config.head_size,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """A text begins after, and ends with, the document's end; an answer ends with the turn's end."""
    return {
        "bos_token_id": tokenizer.document_end_id,
        "eos_token_id": [tokenizer.document_end_id, tokenizer.turn_end_id],
        "pad_token_id": tokenizer.padding_id,
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _write_bytes(path: Path, content: bytes) -> None:
    """``write_atomically`` for bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
