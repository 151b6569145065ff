"""Models as directories in Hugging Face's layout: what ``transformers`` and vLLM load, read and written.

``config.json``, weights in safetensors (one file, or shards with an index), ``generation_config.json`` and the
tokenizer's files. Every stage here reads and writes this, so a model that the pipeline made never needs conversion,
and one from elsewhere (Llama, GPT-2, Qwen 3, and small ones of DeepSeek-V3's and GLM-4.5's architecture) loads where
the decoder computes it exactly. Weights are never pickles. The same weights give the same bytes.
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
from lilpipe.config.model import ModelConfig
from lilpipe.config.overrides import explain
from lilpipe.errors import ArtifactError
from lilpipe.model.state_dict_adapters import LAYOUTS, StateDictAdapter, adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import MAX_SHARD_BYTES, NamedTensors, stored_tensors, weight_files, write_tensors
from lilpipe.tokenizer.encoding import TOKENIZER_FILES, Tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def model_files(directory: Path) -> list[str]:
    """Names of all that ``save_model`` wrote there. Raises ``ArtifactError`` if there are no weights."""
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
    """Write a model whose tensors come one by one, by the decoder's names, those of a layer one after the other.

    So a sharded model need never be whole: one file's worth of tensors is in memory. Weights of more than
    ``max_shard_bytes`` become several files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    layout = adapter_for(config)
    renamed = (item for group in _by_layer(tensors) for item in layout.to_hf(group).items())
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
    write_atomically(directory / CONFIG_FILE, _json({**stated, **layout.write(config), **special}))


def _by_layer(tensors: NamedTensors) -> Iterator[dict[str, Tensor]]:
    """Tensors of each layer, and of what stands between layers, as they come."""
    for _, group in groupby(tensors, key=lambda item: _layer(item[0])):
        yield dict(group)


def _layer(name: str) -> int:
    """Number of the layer that a tensor belongs to, -1 outside of them."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


# --- reading ------------------------------------------------------------------------------------------------------


def load_model(directory: Path) -> tuple[Transformer, Tokenizer]:
    """The model in float32, on the CPU in evaluation mode, and its tokenizer.

    Raises ``ArtifactError`` naming file and key if the directory holds no checkpoint that this decoder computes
    exactly.
    """
    config, vocab_size, tokenizer = check_model(directory)
    model = Transformer(config, vocab_size)
    load_weights(model.state_dict(), directory)
    return model.eval(), tokenizer


def check_model(directory: Path) -> tuple[ModelConfig, int, Tokenizer]:
    """The shape, the vocabulary size and the tokenizer of a checkpoint whose weights are not read yet.

    Raises ``ArtifactError`` if they do not belong together, or if the files are not those of a checkpoint that this
    decoder computes exactly.
    """
    config, vocab_size = read_model_config(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > vocab_size:
        raise ArtifactError(
            f"{directory / CONFIG_FILE}: vocab_size: got {vocab_size}, expected at least the tokenizer's "
            f"{tokenizer.vocab_size}; model and tokenizer do not belong together"
        )
    _check_shapes(directory, config, vocab_size)
    return config, vocab_size, tokenizer


@torch.no_grad()
def load_weights(into: Mapping[str, Tensor], directory: Path) -> None:
    """Copy a checkpoint's weights into parameters and buffers, one tensor after another.

    ``into`` is by the decoder's names and may be a part of the model (a pipeline stage), and may hold DTensors, of
    which each process fills its own part. Raises ``ArtifactError`` if the files do not hold what ``config.json`` says.
    """
    for name, tensor in read_tensors(directory):
        copy_into(into.get(name), tensor)


def copy_into(target: Any, tensor: Tensor) -> None:
    """Fill a tensor, or this process's part of a DTensor, from a whole one; nothing if there is no target."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # takes 0.6 s

        whole = tensor.to(target.device, target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    elif target is not None:
        target.copy_(tensor)


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a checkpoint by the decoder's name, one after another, mapped from the disk where it can be.

    All names and shapes are checked before the first is given. Raises ``ArtifactError``.
    """
    config, vocab_size = read_model_config(directory)
    _check_shapes(directory, config, vocab_size)
    yield from _renamed(directory, config)


def _check_shapes(directory: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raise ``ArtifactError`` for a tensor that is missing, left over or of another shape."""
    given = dict(_renamed(directory, config, shapes_only=True))
    with torch.device("meta"):
        expected = dict(Transformer(config, vocab_size).state_dict())
    for name in sorted(expected.keys() | given.keys()):
        got, wanted = (tuple(held[name].shape) if name in held else "nothing" for held in (given, expected))
        if got != wanted:
            raise ArtifactError(f"{directory}: {name}: got {got}, expected {wanted} by {CONFIG_FILE}")


def _renamed(directory: Path, config: ModelConfig, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the decoder's names; what files hold twice or beside the weights is left out."""
    layout, stated = _read_config(directory)
    # What is mapped takes no memory, so all may be sorted by layer, which shards need not be.
    stored = sorted(stored_tensors(directory, shapes_only=shapes_only), key=lambda item: (_layer(item[0]), item[0]))
    for group in _by_layer(stored):
        for name, tensor in layout.from_hf(group, config, stated).items():
            shared_twice = name == "lm_head.weight" and config.tie_embeddings
            if not (shared_twice or name.endswith("rotary_emb.inv_freq")):
                yield name, tensor


# --- settings -----------------------------------------------------------------------------------------------------


def read_model_config(directory: Path) -> tuple[ModelConfig, int]:
    """The shape and the vocabulary size that ``config.json`` states. Raises ``ArtifactError`` naming the key."""
    path = directory / CONFIG_FILE
    layout, stated = _read_config(directory)
    try:
        config = ModelConfig(**layout.read(stated))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain(error)}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    vocab_size = stated.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ArtifactError(f"{path}: vocab_size: got {vocab_size!r}, expected a positive whole number")
    return config, vocab_size


def _read_config(directory: Path) -> tuple[StateDictAdapter, dict[str, Any]]:
    """The layout that ``config.json`` names, and what it states."""
    path = directory / CONFIG_FILE
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); the directory holds no checkpoint") from error
    if not isinstance(stated, dict):
        raise ArtifactError(f"{path}: got a JSON {type(stated).__name__}, expected an object")
    layouts = {layout.model_type: layout for layout in LAYOUTS}
    if (model_type := stated.get("model_type")) not in layouts:
        raise ArtifactError(
            f"{path}: model_type: got {model_type!r}, expected one of {', '.join(layouts)}; the decoder computes no "
            "other architecture"
        )
    if stated.get("quantization_config"):
        raise ArtifactError(f"{path}: quantization_config: got quantized weights, expected none; take the full ones")
    return layouts[model_type], {key: value for key, value in stated.items() if value is not None or key in _NULLABLE}


_NULLABLE = ("q_lora_rank",)
"""Keys whose null says something; elsewhere it is as good as silence."""


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """A text begins after, and ends with, the document's end; an answer ends with the turn's end."""
    talks = tokenizer.has_turns or tokenizer.template is not None
    ends = list(dict.fromkeys([tokenizer.document_end_id, *([tokenizer.turn_end_id] if talks else [])]))
    return {
        "bos_token_id": tokenizer.document_end_id,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.padding_id,
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
