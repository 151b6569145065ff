"""Low-rank adapters of frozen weights: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

A layer of weight W becomes ``V = W + s B A`` with ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA. DoRA
also learns the norm of each row of V: ``m V / |V|``. W keeps its name, so a checkpoint holds the model's and the
adapters' tensors. B starts as zeros and m as the rows' norms, so the model is unchanged at first. Export merges the
adapters into the weights tensor by tensor, because the whole model may not fit on one worker.

Dimensions: B rows, T tokens, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe.config.lora import LoRAConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model.adapter_dropout import Numbers, carry_numbers, drop, salt_of
from lilpipe.model.backend import PREFIX as BACKEND_PREFIX
from lilpipe.model.backend import Backend
from lilpipe.model.heads import HEAD
from lilpipe.model.hub import copy_into
from lilpipe.model.initial_weights import initial_value
from lilpipe.model.layers import Linear
from lilpipe.model.peft_files import read_adapter
from lilpipe.model.state_dict_adapters import adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.model.weights import NamedTensors

ADAPTABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "smollm3")
"""Model types whose linear layers have the same names here and in ``peft``."""


class Adapter(NamedTuple):
    """Tensors of a layer's adapter, or this process's shards of them."""

    lora_A_RI: Tensor
    lora_B_OR: Tensor
    magnitude_O: Tensor | None = None
    """The rows' norms (DoRA); None for LoRA."""


PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""Names of an adapter's parameters, as in ``peft``."""


def add_to_weight(weight_OI: Tensor, adapter: Adapter, scale: float) -> Tensor:
    """Return the weight with the adapter, ``[O, I]``."""
    changed_OI = weight_OI + scale * (adapter.lora_B_OR @ adapter.lora_A_RI)
    if adapter.magnitude_O is None:
        return changed_OI
    return (adapter.magnitude_O / torch.linalg.vector_norm(changed_OI, dim=1))[:, None] * changed_OI


class LoRALinear(Linear):
    """Linear layer with an adapter."""

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, base: nn.Linear, config: LoRAConfig, name: str) -> None:
        """``name`` is the layer's name in the whole model."""
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_zeros(config.r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.r))
        magnitude = nn.Parameter(base.weight.new_ones(base.out_features)) if config.use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.config, self.name = config, name
        self.salt = salt_of(name.split(".", 3)[-1])
        self.numbers = Numbers()
        """Random numbers of the current tokens, for dropout."""
        self.is_initial = False
        """Whether to compute what the layer computed before training."""
        self.initial: Adapter | None = None
        """The adapter before training; None if it had no effect."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter to compute with; None for none."""
        return self.initial if self.is_initial else Adapter(self.lora_A, self.lora_B, self.lora_magnitude_vector)

    @property
    def frozen_weight(self) -> Tensor:
        """The weight without the adapter, ``[O, I]``."""
        return self.weight

    @property
    def full_weight(self) -> Tensor:
        """The weight with the adapter, ``[O, I]``."""
        weight_OI, adapter = self.frozen_weight, self.adapter
        return weight_OI if adapter is None else add_to_weight(weight_OI, adapter, self.config.scaling)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Map ``[..., I]`` to ``[..., O]``."""
        y, adapter = super().forward(input), self.adapter
        return y if adapter is None else self.add_output(y, input, adapter, self.weight, self.bias)

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        adapter: Adapter,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        *,
        first_input: int = 0,
        sum_shards: Callable[[Tensor], object] = lambda _: None,
    ) -> Tensor:
        """Return the layer's output, given ``y = W x + bias``.

        Under tensor parallelism tensors are shards: ``first_input`` is the index of the first input of this process,
        and ``sum_shards`` sums the squared norms of rows over the processes, in place.
        """
        scale, dropped = self.config.scaling, x
        if self.training and self.config.lora_dropout:
            dropped = drop(x, self.numbers, self.config.lora_dropout, salt=self.salt, first=first_input)
        low = F.linear(dropped, adapter.lora_A_RI)
        change = F.linear(low, adapter.lora_B_OR)
        if adapter.magnitude_O is None:
            return torch.add(y, change, alpha=scale)
        # As in peft, dropout also acts on the part of W that the new norms add.
        own = F.linear(dropped, weight_OI) if dropped is not x else y if bias_O is None else y - bias_O
        squares_O = _row_squares(weight_OI, adapter, scale)
        sum_shards(squares_O)
        ratio_O = (adapter.magnitude_O / squares_O.sqrt()).to(y.dtype)
        return y + (ratio_O - 1) * own + (scale * ratio_O) * change


@torch.no_grad()  # the norm counts as a constant (Liu et al. 2024, section 4.3)
def _row_squares(weight_OI: Tensor, adapter: Adapter, scale: float) -> Tensor:
    """Return the squared norms of the rows of ``W + s B A`` in at least float32, ``[O]``."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    with torch.autocast(weight_OI.device.type, enabled=False):
        matrices = Adapter(adapter.lora_A_RI.to(dtype), adapter.lora_B_OR.to(dtype))
        return add_to_weight(weight_OI.to(dtype), matrices, scale).square().sum(dim=1)


# --- models -------------------------------------------------------------------------------------------------------


def add_adapters(
    model: Transformer,
    config: LoRAConfig,
    *,
    seed: int,
    stage: str,
    make: Callable[[nn.Linear, LoRAConfig, str], LoRALinear] = LoRALinear,
) -> None:
    """Freeze the model, or a pipeline stage of it, and replace its linear layers by those that ``make`` returns.

    A head stays trainable. Call ``start_adapters`` when the weights are loaded. Raises ``ConfigError`` naming the
    setting of ``stage`` for a model whose layers have other names in ``peft``.
    """
    kind = adapter_for(model.config).model_type
    if kind not in ADAPTABLE and not isinstance(model.model, Backend):
        raise ConfigError(
            f"{stage}.lora: got a model of type {kind!r}, expected one of {', '.join(ADAPTABLE)}; remove {stage}.lora "
            "to train all weights"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == HEAD)
    for name, layer in _adapted_by(config, model).items():
        parent, _, kind = name.rpartition(".")
        adapted = make(layer, config, name)
        adapted.train(layer.training)
        matrix_RI = adapted.lora_A.detach()
        own_name = name.removeprefix(BACKEND_PREFIX)  # as in the decoder, so that both draw the same values
        matrix_RI.copy_(initial_value(f"{own_name}.lora_A", matrix_RI.shape, seed=seed, config=model.config))
        setattr(model.get_submodule(parent), kind, adapted)
    if config.lora_dropout:
        for block, numbers in carry_numbers(model).items():
            for layer in adapted_layers(model.model.layers[block]):
                layer.numbers = numbers


def _adapted_by(config: LoRAConfig, model: Transformer) -> dict[str, nn.Linear]:
    """Return the layers that get an adapter, by name. Of a class of transformers, `all-linear` is what it is in
    ``peft``: all linear layers except the output layer, and those whose weights Mamba's kernels read directly.
    """
    if not isinstance(model.model, Backend):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
        return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in config.projections}
    output = model.model.network.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and layer is not output
        and not (name.endswith(".out_proj") and "Mamba" in type(model.get_submodule(name.rpartition(".")[0])).__name__)
        and (config.target_modules == "all-linear" or name.rpartition(".")[2] in config.projections)
    }


@torch.no_grad()
def start_adapters(model: Transformer, config: LoRAConfig, *, stage: str) -> None:
    """Set the adapters from ``config.path`` or, for DoRA, their norms from the loaded weights.

    The model may be a pipeline stage, and its parameters DTensors. Raises ``ConfigError`` if the stored adapter has
    other settings, ``ArtifactError`` if its files do not fit the model.
    """
    layers = adapted_layers(model)
    if config.path is not None:
        _load(model, layers, config, stage=stage)
    elif config.use_dora:
        for layer in layers:
            copy_into(layer.lora_magnitude_vector, torch.linalg.vector_norm(_whole(layer.frozen_weight), dim=1))


def _load(model: Transformer, layers: list[LoRALinear], config: LoRAConfig, *, stage: str) -> None:
    assert config.path is not None
    directory = Path(config.path)
    stored, tensors = read_adapter(directory, by_class=isinstance(model.model, Backend))
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules"):
        got, expected = getattr(config, name), getattr(stored, name)
        same = set(config.projections) == set(stored.projections) if name == "target_modules" else got == expected
        if not same:
            raise ConfigError(
                f"{stage}.lora.{name}: got {got!r}, expected {expected!r} as in the adapter {directory}; set it so"
            )
    held = dict(model.named_parameters())
    parts = PARTS if config.use_dora else PARTS[:2]
    wanted = {f"{layer.name}.{part}" for layer in layers for part in parts}
    wanted |= {HEAD} & held.keys() & tensors.keys()
    elsewhere = {str(layer) for layer in range(model.config.num_layers)} - model.model.layers.keys()
    given = {name for name in tensors if name == HEAD or name.split(".")[2] not in elsewhere}
    if wrong := wanted.symmetric_difference(given):
        name = min(wrong)
        raise ArtifactError(
            f"{directory}: {name}: got {'it' if name in given else 'nothing'}, expected "
            f"{'nothing' if name in given else 'it'}; use the adapter of this model"
        )
    for name in wanted:
        if held[name].shape != tensors[name].shape:
            got, expected = tuple(tensors[name].shape), tuple(held[name].shape)
            raise ArtifactError(f"{directory}: {name}: got {got}, expected {expected}; use the adapter of this model")
        copy_into(held[name], tensors[name])
    for layer in layers:
        if not hasattr(layer.weight, "device_mesh"):  # a sharded model is never asked for its initial outputs
            layer.initial = Adapter(*(held[f"{layer.name}.{part}"].detach().clone() for part in parts))


def load_adapter(model: Transformer, directory: Path) -> LoRAConfig:
    """Add an adapter in ``peft``'s format to a loaded model, in place, and return its settings.

    Raises ``ArtifactError`` if it is damaged, not supported, or of another model.
    """
    config, _ = read_adapter(directory, by_class=isinstance(model.model, Backend))
    add_adapters(model, config, seed=0, stage="adapter")
    start_adapters(model, config, stage="adapter")
    return config


def with_adapter(model: Transformer, directory: Path) -> Transformer:
    """Return a model that shares the weights of ``model`` and has an adapter. Raises ``ArtifactError`` as above."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    load_adapter(twin, directory)
    return twin.eval()


def adapted_layers(model: nn.Module) -> list[LoRALinear]:
    """Return all layers with an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


@contextmanager
def initial_adapters(model: Transformer) -> Iterator[Transformer]:
    """Context in which a model computes what it did before training: the frozen weights, with the adapters it started
    from, if any. So the reference model of DPO, GRPO and PPO needs no second copy of the weights.
    """
    layers = adapted_layers(model)
    for layer in layers:
        layer.is_initial = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.is_initial = False


# --- tensors ------------------------------------------------------------------------------------------------------


def merge(tensors: NamedTensors, config: LoRAConfig, adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Merge the adapters into the weights of a stream of tensors that is grouped by layer.

    A weight becomes ``add_to_weight``, computed in float64. The adapters' tensors are put into ``adapters``, also those
    of a head.
    """
    for layer, members in groupby(tensors, key=lambda item: item[0].rpartition(".")[0]):
        found = dict(members)
        matrices = {name: found.pop(name) for name in (f"{layer}.{part}" for part in PARTS) if name in found}
        if matrices:
            adapters |= matrices
            weight_OI = found[f"{layer}.weight"]
            adapter = Adapter(*(tensor.double() for tensor in matrices.values()))
            found[f"{layer}.weight"] = add_to_weight(weight_OI.double(), adapter, config.scaling).to(weight_OI.dtype)
        adapters |= {HEAD: found[HEAD]} if HEAD in found else {}
        yield from found.items()


def with_frozen_weights(model: nn.Module, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors, and before those of an adapter its frozen weight if that has 4 bits, dequantized."""
    missing = {layer.name: layer for layer in adapted_layers(model) if layer.config.load_in_4bit}
    for name, tensor in tensors:
        if (layer := missing.pop(name.rpartition(".")[0], None)) is not None:
            yield f"{layer.name}.weight", layer.frozen_weight
        yield name, tensor


def merged_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield a whole model's tensors by name, with its adapters, if any, merged into the weights."""
    layers = adapted_layers(model)
    tensors = with_frozen_weights(model, model.state_dict().items())
    yield from merge(tensors, layers[0].config, {}) if layers else tensors


def _whole(tensor: Any) -> Tensor:
    """Return the whole of a tensor that may be a shard. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
