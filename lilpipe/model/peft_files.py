"""Adapters in ``peft``'s format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors have their layer's name in the model. Settings of ``peft`` that would change what the adapter computes, and that
this package does not support, are rejected. Pickled adapters are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lilpipe.artifact import write_atomically
from lilpipe.config.lora import ADAPTER_FILES, LoRAConfig, Projection
from lilpipe.config.overrides import explain
from lilpipe.errors import ArtifactError
from lilpipe.model.backend import PREFIX as BACKEND_PREFIX

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
_PREFIX = "base_model.model."
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "target_modules", "exclude_modules", "modules_to_save", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "loftq_config", "runtime_config"),
}
"""Keys that do not change what an adapter computes, given its tensors."""
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the weights of the base as they are."""


def save_adapter(tensors: Mapping[str, Tensor], config: LoRAConfig, directory: Path, *, has_head: bool) -> None:
    """Write an adapter; ``tensors`` are those of ``lilpipe.model.lora`` and, if ``has_head``, the head's."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {_to_peft(name): tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    stated = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": _target_modules(tensors),
        "modules_to_save": ["score"] if has_head else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_atomically(directory / CONFIG_FILE, json.dumps(stated, indent=2, sort_keys=True) + "\n")


def _target_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the last parts of the adapted layers' names: those of the decoder in its order, others sorted."""
    kinds = {name.split(".")[-2] for name in tensors if name.endswith(".lora_A")}
    own = [kind for kind in get_args(Projection) if kind in kinds]
    return [*own, *sorted(kinds - set(own))]


def read_adapter(directory: Path, *, by_class: bool = False) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return an adapter's settings and its tensors, by the names of ``lilpipe.model.lora``.

    ``by_class``: of a model that a class of transformers computes, whose layers have other names than the decoder's.
    Raises ``ArtifactError`` naming the file and the key of what is missing, damaged or not supported.
    """
    tensors = _read_tensors(directory, by_class=by_class)
    path = directory / CONFIG_FILE
    stated = _read_config(path)
    kinds = {name.split(".")[-2] for name in tensors if "." in name and name != "score.weight"}
    if not by_class and (unknown := sorted(kinds - set(get_args(Projection)))):
        raise ArtifactError(
            f"{directory / WEIGHTS_FILE}: got an adapter of {unknown[0]!r}, expected one of "
            f"{', '.join(get_args(Projection))}; merge the adapter into the model with peft instead"
        )
    modules = tuple(kind for kind in get_args(Projection) if kind in kinds)
    try:
        values = {name: stated[name] for name in _SETTINGS if stated.get(name) is not None}
        whole = modules == get_args(Projection) or not kinds <= set(modules)
        config = LoRAConfig(**values, target_modules="all-linear" if whole else modules, path=str(directory))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain(error)}") from error
    return config, tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); expected the directory of a peft adapter") from error
    if not isinstance(stated, dict):
        raise ArtifactError(f"{path}: got a JSON {type(stated).__name__}, expected an object")
    neutral = {"bias": "none", "peft_type": "LORA"}
    for key, value in stated.items():
        plain = not value or key in _SETTINGS or key in _WITHOUT_EFFECT
        if value != neutral[key] if key in neutral else not plain:
            raise ArtifactError(
                f"{path}: {key}: got {value!r}, expected {neutral.get(key)!r}; this setting of peft is not supported: "
                "merge the adapter into the model with peft instead"
            )
    if (got := stated.get("init_lora_weights")) not in _INITIALISATIONS:
        raise ArtifactError(
            f"{path}: init_lora_weights: got {got!r}, which changes the weights of the base, expected true; convert "
            "the adapter with peft's path_initial_model_for_weight_conversion"
        )
    return stated


def _read_tensors(directory: Path, *, by_class: bool) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.exists() and (pickled := sorted(directory.glob("adapter_model.bin"))):
        raise ArtifactError(
            f"{pickled[0]}: got pickled weights, which can run code when read, expected {WEIGHTS_FILE}; save the "
            "adapter with safe_serialization=True"
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}); copy the adapter again") from error
    return {_from_peft(name, path, by_class=by_class): tensor for name, tensor in stored.items()}


def _to_peft(name: str) -> str:
    return f"{_PREFIX}{name.removeprefix(BACKEND_PREFIX)}" + (
        ".weight" if name.endswith((".lora_A", ".lora_B")) else ""
    )


def _from_peft(name: str, path: Path, *, by_class: bool) -> str:
    ours = name.removeprefix(_PREFIX)
    placed = ours.startswith("model.layers.") or ours == "score.weight" or by_class
    ours = f"{BACKEND_PREFIX}{ours}" if by_class and ours != "score.weight" else ours
    if ours.endswith((".lora_A.weight", ".lora_B.weight")):
        ours = ours.removesuffix(".weight")
    if not placed or not ours.endswith((".lora_A", ".lora_B", ".lora_magnitude_vector", "score.weight")):
        raise ArtifactError(
            f"{path}: {name}: got an unknown tensor, expected LoRA matrices, such as "
            f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight; merge the adapter with peft instead"
        )
    return ours
