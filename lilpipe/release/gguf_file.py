"""Writes a Hugging Face checkpoint as a GGUF file, the format of llama.cpp and Ollama.

Metadata and tensor names follow the ``gguf`` package (extra ``gguf``), which llama.cpp publishes. One tensor is in
memory at a time. Vectors (norms, biases) stay in float32, as in llama.cpp's own conversion; matrices get the file's
type. Equal checkpoints give equal bytes.

Dimensions of weights: O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from lilpipe.config.release import GGUFType, KQuant
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.families import FAMILIES as HF_FAMILIES
from lilpipe.model.hub import CONFIG_FILE
from lilpipe.model.weights import stored_tensors
from lilpipe.release.gguf_families import FAMILIES, Family, Stated, stack_experts
from lilpipe.release.gguf_vocabulary import add_vocabulary, check_vocabulary


def import_gguf() -> ModuleType:
    """Import the package ``gguf``. Raises ``ConfigError`` if it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ConfigError(
            "release.gguf: package gguf is not installed; run `pip install -c constraints.txt -e '.[gguf]'`, or set "
            "release.gguf = []"
        ) from error
    return gguf


def check_gguf(directory: Path) -> Family:
    """Return the family of a checkpoint. Raises ``ConfigError`` if llama.cpp does not compute the model."""
    stated = _config(directory)
    kind = stated.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"release.gguf: got a model of type {kind!r}, expected one of {', '.join(FAMILIES)}; set release.gguf = []"
        )
    family = FAMILIES[kind]
    for key, required in family.required.items():
        expected = required(stated) if callable(required) else required
        if stated.get(key, expected) != expected:
            raise ConfigError(
                f"release.gguf: {key}: got {stated[key]!r}, expected {expected!r} for {kind}; set release.gguf = []"
            )
    for rope in _ropes(stated):
        if rope["rope_type"] not in family.rope_types:
            raise ConfigError(
                f"release.gguf: rope_type: got {rope['rope_type']!r}, expected one of {', '.join(family.rope_types)} "
                f"for {kind}; set release.gguf = []"
            )
    check_vocabulary(directory)
    return family


def write_gguf(directory: Path, path: Path, file_type: GGUFType, *, name: str) -> None:
    """Write the checkpoint in ``directory`` to ``path``. Raises ``ConfigError`` for what llama.cpp does not support."""
    gguf = import_gguf()
    family, stated = check_gguf(directory), _config(directory)
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_name(name)
    _add_shape(writer, family, stated)
    if stated["model_type"] != "gpt2":
        _add_rope(writer, gguf, stated)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, directory, stated["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name.upper()], stated["num_hidden_layers"])
    factors = _rope_factors(stated)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    types = {}
    for tensor_name, tensor in _tensors(directory, stated, shapes_only=True):
        target = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"release.gguf: {tensor_name}: got a tensor that llama.cpp's {family.name} does not have")
        shape = family.convert(tensor_name, tensor, stated).shape
        types[tensor_name] = stored = _stored_type(gguf, target, shape, file_type)
        shape = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(target, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor_name, tensor in _tensors(directory, stated):
        array = family.convert(tensor_name, tensor.float(), stated).numpy()
        writer.write_tensor_data(gguf.quants.quantize(array, types[tensor_name]))
    writer.close()


def _tensors(directory: Path, stated: Stated, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, experts stacked. llama.cpp uses the embedding as output layer if there is no other."""
    for name, tensor in stack_experts(stored_tensors(directory, shapes_only=shapes_only), stated):
        if not (name == "lm_head.weight" and stated.get("tie_word_embeddings")):
            yield name, tensor


def _stored_type(gguf: ModuleType, target: str, shape: Sequence[int], file_type: GGUFType) -> Any:
    """Return the type of a tensor: float32 for vectors, routers and learned positions, float16 for a matrix whose rows
    do not fill whole blocks.
    """
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or target.endswith("ffn_gate_inp.weight") or target == "position_embd.weight":
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[file_type]]
    return types.F16 if shape[-1] % block else types[file_type]


_GPT2_NAMES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
_DEFAULTS: Mapping[Any, Stated] = {row.model_type: row.defaults for row in HF_FAMILIES}


def _config(directory: Path) -> Stated:
    """Return the content of ``config.json`` with the class's defaults, under Llama's names."""
    path = directory / CONFIG_FILE
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); expected the directory of a checkpoint") from error
    stated = {**_DEFAULTS.get(stated.get("model_type"), {}), **stated}
    if stated.get("model_type") == "gpt2":
        stated |= {ours: stated.get(theirs) for ours, theirs in _GPT2_NAMES.items()}
        stated["intermediate_size"] = stated["intermediate_size"] or 4 * stated["hidden_size"]
    return stated


def _add_shape(writer: Any, family: Family, stated: Stated) -> None:
    """Write the model's dimensions."""
    num_heads, head_dim = stated["num_attention_heads"], _head_dim(stated)
    window = None if "use_sliding_window" in family.required else stated.get("sliding_window")
    context = stated["max_position_embeddings"]
    writer.add_context_length(min(context, window) if window and not family.windows else context)
    if family.windows:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in stated["layer_types"]])
        if window:
            writer.add_sliding_window(window)
    writer.add_embedding_length(stated["hidden_size"])
    writer.add_block_count(stated["num_hidden_layers"])
    writer.add_feed_forward_length(stated["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(stated.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(stated["vocab_size"])
    experts = stated.get("num_local_experts") or stated.get("num_experts")
    for add, value in (
        (writer.add_layer_norm_rms_eps, stated.get("rms_norm_eps")),
        (writer.add_layer_norm_eps, stated.get("layer_norm_eps")),
        (writer.add_attn_logit_softcapping, stated.get("attn_logit_softcapping")),
        (writer.add_final_logit_softcapping, stated.get("final_logit_softcapping")),
        (writer.add_expert_count, experts),
        (writer.add_expert_used_count, experts and stated["num_experts_per_tok"]),
        (writer.add_expert_feed_forward_length, stated.get("moe_intermediate_size")),
        (writer.add_parallel_residual, stated.get("use_parallel_residual")),
    ):
        if value is not None:
            add(value)


def _head_dim(stated: Stated) -> int:
    return stated.get("head_dim") or stated["hidden_size"] // stated["num_attention_heads"]


def _add_rope(writer: Any, gguf: ModuleType, stated: Stated) -> None:
    """Write the RoPE settings; layers with a sliding window may have their own base."""
    rope, *local = _ropes(stated)
    share = rope.get("partial_rotary_factor", stated.get("rotary_pct", 1.0))
    writer.add_rope_dimension_count(int(_head_dim(stated) * share))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if local:
        writer.add_rope_freq_base_swa(float(local[0]["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings", stated["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)


def _ropes(stated: Stated) -> list[dict[str, Any]]:
    """Return the RoPE settings of all layers, or of full and of sliding attention.

    transformers writes them in one key since version 5 and in two before.
    """
    found = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    parts = [found[kind] for kind in ("full_attention", "sliding_attention") if kind in found] or [found]
    base = stated.get("rope_theta", 10_000.0)
    return [
        {"rope_theta": base, **part, "rope_type": part.get("rope_type", part.get("type", "default"))} for part in parts
    ]


def _rope_factors(stated: Stated) -> np.ndarray | None:
    """Return what llama.cpp divides each frequency by for Llama 3's RoPE scaling, float32 [E / 2]; else None.

    Frequencies above a wavelength are divided by ``factor``, those below another one are kept, and those between are
    interpolated (Grattafiori et al. 2024; the formula is that of transformers).
    """
    rope, head_dim = _ropes(stated)[0], _head_dim(stated)
    if rope["rope_type"] != "llama3":
        return None
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    share = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    share = np.clip(share, 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


K_QUANTS: Mapping[KQuant, int] = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""File types that the package ``gguf`` cannot write, with llama.cpp's numbers for them (``llama_ftype``)."""


def quantize_gguf(source: Path, path: Path, file_type: KQuant) -> None:
    """Quantize a GGUF file with llama.cpp. Raises ``ConfigError`` if ``llama-cpp-python`` is not installed."""
    try:
        import llama_cpp  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"release.gguf: {file_type}: package llama-cpp-python is not installed; run `pip install "
            f"llama-cpp-python`, or use Q8_0"
        ) from error
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = K_QUANTS[file_type]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.pointer(options)):
        raise ArtifactError(f"{source}: llama.cpp could not quantize it to {file_type}; its messages are above")
