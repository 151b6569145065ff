"""Models in Hugging Face's directory layout, as ``transformers`` and vLLM load them.

A directory holds ``config.json``, weights in safetensors (one file, or shards with an index),
``generation_config.json`` and the tokenizer's files. All stages read and write this layout, so models need no
conversion. Checkpoints of other projects load if the decoder computes them exactly (``families``), all other
architectures with a class of transformers (``backend``). Weights are never pickles. Equal weights give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lilpipe.artifact import write_atomically
from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.overrides import explain
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.backend import load_backend, read_backend_config
from lilpipe.model.family import UnsupportedError
from lilpipe.model.state_dict_adapters import LAYOUTS, StateDictAdapter, adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import (
    MAX_SHARD_BYTES,
    NamedTensors,
    held_tensors,
    stored_tensors,
    weight_files,
    write_tensors,
)
from lilpipe.tokenizer.encoding import TOKENIZER_FILES, Tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 10**7
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights. Others are quantized, and their scales are elsewhere."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def model_files(directory: Path) -> list[str]:
    """Return the names of all files that ``save_model`` wrote. Raises ``ArtifactError`` if there are no weights."""
    names = [CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES]
    return [*weight_files(directory), *(name for name in names if (directory / name).exists())]


# --- writing ------------------------------------------------------------------------------------------------------


def save_model(
    model: Transformer, tokenizer: Tokenizer, directory: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write model and tokenizer, each file atomically; equal weights give equal bytes."""
    save_tensors(model.config, model.vocab_size, model.state_dict().items(), tokenizer, directory, dtype=dtype)


def save_tensors(
    config: ModelConfig,
    vocab_size: int,
    tensors: NamedTensors,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model from a stream of tensors by the decoder's names, grouped by layer.

    So a sharded model is never gathered whole: memory holds the tensors of one file. Weights larger than
    ``max_shard_bytes`` are split into several files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    layout = adapter_for(config)
    renamed = (item for group in _by_layer(tensors) for item in layout.to_hf(group, config).items())
    write_tensors(renamed, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)
    special = _special_ids(tokenizer)
    write_atomically(directory / GENERATION_FILE, _json(special))
    precision = str(dtype).removeprefix("torch.")
    stated = {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        "vocab_size": vocab_size,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": precision,
        "torch_dtype": precision,  # read by transformers before version 5
    }
    if isinstance(config, BackendConfig):
        stated, special = {}, {"dtype": precision, "torch_dtype": precision}
    write_atomically(directory / CONFIG_FILE, _json({**stated, **layout.write(config), **special}))


def _by_layer(tensors: NamedTensors) -> Iterator[dict[str, Tensor]]:
    """Group consecutive tensors by layer."""
    for _, group in groupby(tensors, key=lambda item: _layer(item[0])):
        yield dict(group)


def _layer(name: str) -> int:
    """Return the index of the tensor's layer, or -1 outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


# --- reading ------------------------------------------------------------------------------------------------------


def load_model(directory: Path) -> tuple[Transformer, Tokenizer]:
    """Load the model in float32 on the CPU, in evaluation mode, and its tokenizer.

    Raises ``ArtifactError`` naming file and key if the directory holds no checkpoint that this decoder or a class of
    transformers computes exactly.
    """
    config, vocab_size, tokenizer = check_model(directory)
    if isinstance(config, BackendConfig):
        with torch.device("meta"):
            model = Transformer(config, vocab_size)
        model.model = load_backend(directory, config)
        return model.eval(), tokenizer
    model = Transformer(config, vocab_size)
    load_weights(model.state_dict(), directory)
    return model.eval(), tokenizer


def check_model(directory: Path) -> tuple[ModelConfig, int, Tokenizer]:
    """Return config, vocabulary size and tokenizer of a checkpoint, without reading its weights.

    Raises ``ArtifactError`` if model and tokenizer do not match, or if the decoder does not compute the model exactly.
    """
    config, vocab_size = read_model_config(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.num_needed_ids > vocab_size:
        raise ArtifactError(
            f"{directory / CONFIG_FILE}: vocab_size: got {vocab_size}, expected at least the "
            f"{tokenizer.num_needed_ids} of the tokenizer; use the tokenizer of this model"
        )
    _check_shapes(directory, config, vocab_size)
    return config, vocab_size, tokenizer


@torch.no_grad()
def load_weights(into: Mapping[str, Tensor], directory: Path) -> None:
    """Copy a checkpoint's weights into parameters and buffers, one tensor at a time.

    ``into`` maps the decoder's names to tensors. It may hold only a pipeline stage, and DTensors, of which each process
    fills its own shard. Raises ``ArtifactError`` if the files do not match ``config.json``.
    """
    for name, tensor in read_tensors(directory):
        copy_into(into.get(name), tensor)


def copy_into(target: Any, tensor: Tensor) -> None:
    """Copy a whole tensor into a tensor or into this process's shard of a DTensor; None is ignored."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # the import takes 0.6 s

        whole = tensor.to(target.device, target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    elif target is not None:
        target.copy_(tensor)


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors by the decoder's names, memory-mapped where possible.

    Checks all names and shapes before the first tensor. Raises ``ArtifactError``.
    """
    config, vocab_size = read_model_config(directory)
    _check_shapes(directory, config, vocab_size)
    if isinstance(config, BackendConfig):
        yield from ((f"model.{name}", tensor) for name, tensor in held_tensors(load_backend(directory, config)))
    else:
        yield from _renamed(directory, config)


def _check_shapes(directory: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raise ``ArtifactError`` for a missing or unexpected tensor, or one of another shape or type.

    transformers checks the names and shapes of models that it computes.
    """
    if isinstance(config, BackendConfig):
        for name, tensor in stored_tensors(directory, shapes_only=True):
            _check_dtype(directory, name, tensor.dtype)
        return
    given = dict(_renamed(directory, config, shapes_only=True))
    num_layers = len({_layer(name) for name in given} - {-1})
    if config.num_layers > num_layers + 1:  # otherwise the missing tensors are named
        raise ArtifactError(
            f"{directory}: number of layers: got {config.num_layers:,} in {CONFIG_FILE}, expected the {num_layers:,} "
            "of the weights; copy all files from the same checkpoint"
        )
    try:
        with torch.device("meta"):
            expected = dict(Transformer(config, vocab_size).state_dict())
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, for numbers that do not fit in 64 bits
        reason = str(error).partition("\n")[0][:200]
        raise ArtifactError(f"{directory}: {CONFIG_FILE}: impossible sizes ({reason})") from error
    for name in sorted(expected.keys() | given.keys()):
        got, wanted = (tuple(held[name].shape) if name in held else "nothing" for held in (given, expected))
        if got != wanted:
            raise ArtifactError(f"{directory}: {name}: got {got}, expected {wanted} from {CONFIG_FILE}")
        _check_dtype(directory, name, given[name].dtype)


def _check_dtype(directory: Path, name: str, dtype: torch.dtype) -> None:
    """Raise ``ArtifactError`` for a quantized tensor."""
    if dtype not in FLOATS:
        raise ArtifactError(
            f"{directory}: {name}: got {dtype}, expected one of {', '.join(map(str, FLOATS))}; use the unquantized "
            "checkpoint"
        )


def _renamed(directory: Path, config: ModelConfig, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by the decoder's names, without duplicates of tied weights and without RoPE buffers."""
    layout, content = _read_config(directory)
    assert layout is not None
    stated = _stated(content)
    shapes = sorted(stored_tensors(directory, shapes_only=True), key=lambda item: (_layer(item[0]), item[0]))
    for group in _by_layer(shapes):
        if not shapes_only:  # a mapping of its own for each layer, so that the pages of earlier ones are released
            held = dict(stored_tensors(directory, only=group.keys()))
            group = {name: held[name] for name in group}
        for name, tensor in layout.from_hf(group, config, stated).items():
            shared_twice = name == "lm_head.weight" and config.tie_embeddings
            if not (shared_twice or name.endswith("rotary_emb.inv_freq")):
                yield name, tensor


# --- settings -----------------------------------------------------------------------------------------------------


def read_model_config(directory: Path) -> tuple[ModelConfig, int]:
    """Return the config and the vocabulary size from ``config.json``. Raises ``ArtifactError`` naming the key."""
    path = directory / CONFIG_FILE
    layout, stated = _read_config(directory)
    if layout is None:
        return read_backend_config(path, stated)
    try:
        config = ModelConfig(**layout.read(_stated(stated)))
    except UnsupportedError as error:
        return _computed_by_class(path, stated, error)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain(error)}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    vocab_size = stated.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ArtifactError(f"{path}: vocab_size: got {vocab_size!r}, expected a positive integer")
    return config, vocab_size


def _computed_by_class(path: Path, stated: dict[str, Any], reason: UnsupportedError) -> tuple[BackendConfig, int]:
    """Return the config for the class of transformers. Raises ``ArtifactError`` if that does not compute it either."""
    try:
        config, vocab_size = read_backend_config(path, stated)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {reason}, or the class of transformers: install lilpipe[hf]") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {reason}") from error
    return config.model_copy(update={"reason": str(reason)}), vocab_size


def _read_config(directory: Path) -> tuple[StateDictAdapter | None, dict[str, Any]]:
    """Return the adapter for the ``model_type`` in ``config.json``, None for one of transformers, and the content."""
    path = directory / CONFIG_FILE
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"{size:,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); expected the directory of a checkpoint") from error
    if not isinstance(stated, dict):
        raise ArtifactError(f"{path}: got a JSON {type(stated).__name__}, expected an object")
    if stated.get("quantization_config"):
        raise ArtifactError(
            f"{path}: quantization_config: got quantized weights, expected none; use the unquantized checkpoint"
        )
    layout = next((layout for layout in LAYOUTS if layout.model_type == stated.get("model_type")), None)
    return layout, stated


def _stated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a family reads."""
    return {key: value for key, value in content.items() if value is not None or key in _NULLABLE}


_NULLABLE = (
    *("q_lora_rank", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads"),
)
"""Keys whose null is meaningful; other keys with null count as absent."""


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """A text starts after its first token, else after the end-of-document token, with which it ends.

    An answer ends with the end-of-turn token.
    """
    talks = tokenizer.has_turns or tokenizer.template is not None
    ends = list(dict.fromkeys([tokenizer.document_end_id, *([tokenizer.turn_end_id] if talks else [])]))
    return {
        "bos_token_id": (*tokenizer.document_start_ids, tokenizer.document_end_id)[0],
        "eos_token_id": ends,
        "pad_token_id": tokenizer.padding_id,
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
