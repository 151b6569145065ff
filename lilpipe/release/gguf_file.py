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
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from lilpipe.config.release import GGUFType, KQuant
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.hub import CONFIG_FILE
from lilpipe.model.weights import stored_tensors
from lilpipe.release.gguf_vocabulary import add_vocabulary, check_vocabulary

Stated = Mapping[str, Any]
"""Content of a ``config.json``."""


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores the models of one ``model_type``."""

    name: str
    """Architecture name in GGUF."""
    interleaved_rope: bool = False
    """Whether llama.cpp rotates neighbouring dimensions, so that the rows of q_proj and k_proj must be reordered."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``config.json`` that llama.cpp fixes for this architecture."""


FAMILIES = {
    "llama": Family("llama", interleaved_rope=True, required={"hidden_act": "silu"}),
    "mistral": Family("llama", interleaved_rope=True, required={"hidden_act": "silu", "sliding_window": None}),
    "qwen2": Family("qwen2", required={"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Family("qwen3", required={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}),
}
"""Families by ``model_type``. Each is compared with llama.cpp in ``tests/release/test_gguf_file.py``."""


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
    for key, expected in FAMILIES[kind].required.items():
        if stated.get(key, expected) != expected:
            raise ConfigError(
                f"release.gguf: {key}: got {stated[key]!r}, expected {expected!r} for {kind}; set release.gguf = []"
            )
    check_vocabulary(directory)
    return FAMILIES[kind]


def write_gguf(directory: Path, path: Path, file_type: GGUFType, *, name: str) -> None:
    """Write the checkpoint in ``directory`` to ``path``. Raises ``ConfigError`` for what llama.cpp does not support."""
    gguf = import_gguf()
    family, stated = check_gguf(directory), _config(directory)
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_name(name)
    _add_shape(writer, gguf, stated)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, directory, stated["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name.upper()], stated["num_hidden_layers"])
    factors = _rope_factors(stated)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor_name, tensor in _tensors(directory, stated, shapes_only=True):
        target = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"release.gguf: {tensor_name}: got a tensor that llama.cpp's {family.name} does not have")
        stored = _stored_type(gguf, tensor.shape, file_type)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored)
        writer.add_tensor_info(target, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor_name, tensor in _tensors(directory, stated):
        array = tensor.float()
        if family.interleaved_rope and (match := _ROTATED.search(tensor_name)):
            kind = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            array = interleave(array, stated.get(kind) or stated["num_attention_heads"])
        stored = _stored_type(gguf, tensor.shape, file_type)
        writer.write_tensor_data(gguf.quants.quantize(array.numpy(), stored))
    writer.close()


_ROTATED = re.compile(r"\.([qk])_proj\.(?:weight|bias)$")


def _tensors(directory: Path, stated: Stated, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors. llama.cpp uses the embedding as output layer if there is no other."""
    for name, tensor in stored_tensors(directory, shapes_only=shapes_only):
        if not (name == "lm_head.weight" and stated.get("tie_word_embeddings")):
            yield name, tensor


def _stored_type(gguf: ModuleType, shape: Sequence[int], file_type: GGUFType) -> Any:
    """Return the type of a tensor: float32 for vectors, float16 for a matrix whose rows do not fill whole blocks."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[file_type]]
    return types.F16 if shape[-1] % block else types[file_type]


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); expected the directory of a checkpoint") from error


def _add_shape(writer: Any, gguf: ModuleType, stated: Stated) -> None:
    """Write the model's dimensions and the RoPE settings."""
    num_heads = stated["num_attention_heads"]
    head_dim = stated.get("head_dim") or stated["hidden_size"] // num_heads
    rope = _rope(stated)
    writer.add_context_length(stated["max_position_embeddings"])
    writer.add_embedding_length(stated["hidden_size"])
    writer.add_block_count(stated["num_hidden_layers"])
    writer.add_feed_forward_length(stated["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(stated.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(stated["rms_norm_eps"])
    writer.add_vocab_size(stated["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings", stated["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)


def _rope(stated: Stated) -> dict[str, Any]:
    """Return the RoPE settings, which transformers writes in one key since version 5 and in two before."""
    found = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    rope = {"rope_theta": stated.get("rope_theta", 10_000.0), **found}
    rope["rope_type"] = found.get("rope_type", found.get("type", "default"))
    kinds = ("default", "linear", "yarn", "llama3")
    if rope["rope_type"] not in kinds:
        raise ConfigError(f"release.gguf: rope_type: got {rope['rope_type']!r}, expected one of {', '.join(kinds)}")
    return rope


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head: Hugging Face pairs dimension i with i + E / 2, llama.cpp 2 i with 2 i + 1."""
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _rope_factors(stated: Stated) -> np.ndarray | None:
    """Return what llama.cpp divides each frequency by for Llama 3's RoPE scaling, float32 [E / 2]; else None.

    Frequencies above a wavelength are divided by ``factor``, those below another one are kept, and those between are
    interpolated (Grattafiori et al. 2024; the formula is that of transformers).
    """
    rope = _rope(stated)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = stated.get("head_dim") or stated["hidden_size"] // stated["num_attention_heads"]
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
