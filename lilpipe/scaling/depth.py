"""Settings of model and training derived from depth or from a number of parameters.

| setting | rule | source |
| --- | --- | --- |
| width | 64 x depth, rounded up to whole heads | nanochat (Karpathy 2025); Kaplan et al. 2020, 3.1: the loss hardly \
depends on this ratio |
| head | 64 wide; 128 from width 1024 | GPT-2 small (Radford et al. 2019) and Llama 3 (2024) |
| key/value heads | one per four query heads, or the nearest divisor | Llama 3 8B: 8 for 32 |
| feed-forward width | 8/3 x width, rounded up to 64; GPT-2: 4 x width | Shazeer 2020; Radford et al. 2019 |
| tokens | 20 per active parameter | Hoffmann et al. 2022 (Chinchilla) |
| batch | 0.2920 C^0.3271 tokens | DeepSeek LLM (Bi et al. 2024), equation 1 |
| learning rate (AdamW) | 0.3118 C^-0.1250 | the same |
| warmup | 2,000 steps, at most 1/20 of all steps | the same; the limit is ours |

C is the run's training FLOPs. DeepSeek fitted its laws to budgets of 1e17 to 2e19 FLOPs; far smaller budgets are
extrapolations. Muon's learning rate does not change: its update has the same size at any width (Jordan et al. 2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from lilpipe.config.model import ModelConfig
from lilpipe.config.overrides import explain
from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.section import Section
from lilpipe.errors import ConfigError
from lilpipe.model.flops import num_active_parameters, num_parameters, training_flops_per_token

ASPECT = 64
NARROW_HEAD, WIDE_HEAD, WIDE_FROM = 64, 128, 1024
QUERIES_PER_KEY = 4
FEED_FORWARD_MULTIPLE = 64
TOKENS_PER_PARAMETER = 20
MAX_WARMUP_STEPS, MAX_WARMUP_SHARE = 2_000, 0.05
MAX_DEPTH = 256
"""Largest depth in the search for a number of parameters."""
_COUNTS = {
    "depth",
    "tokenizer.vocab_size",
    "pretrain.batch_size",
    "pretrain.num_steps",
    "pretrain.seq_len",
    "pretrain.num_workers",
    "pretrain.accumulation_steps",
    "pretrain.parallel.tensor",
    *(f"pretrain.model.{name}" for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "max_seq_len")),
}
"""Settings from which others are computed; checked to be positive integers before the configuration is validated."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def derive(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the dotted settings that follow from `depth` or `params` in ``values``; empty if neither is set.

    Args:
        values: The whole configuration as plain values, the user's settings merged into the recipe's.
        given: Dotted names of the user's own settings. They are not changed, and others are derived from them.

    Raises ``ConfigError`` for invalid values, or if both are set.
    """
    depth, params = values.get("depth"), values.get("params")
    if depth is None and params is None:
        return {}
    if depth is not None and params is not None:
        raise ConfigError(
            f"depth and params: got {depth} and {params}, expected only one, the other follows from it; remove either"
        )
    for name in sorted(_COUNTS & set(given)):
        _check_count(name, values)
    if params is not None:
        depth = nearest_depth(values, given, target=parse_count(params))
    assert depth is not None
    shape = derive_shape(depth, values, given)
    derived = {f"pretrain.model.{name}": value for name, value in shape.items()}
    derived |= derive_training(_model(values, shape), values, given)
    return {name: value for name, value in derived.items() if name not in given}


def parse_count(count: str | float) -> int:
    """Return a number of parameters: 350_000_000 or "350M"; K, M, B and T are 10^3, 10^6, 10^9 and 10^12."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*", str(count), re.IGNORECASE)
    number = float(count) if isinstance(count, int | float) else 0.0
    if match:
        number = float(match[1]) * _UNITS[match[2].upper()]
    if isinstance(count, bool) or number < 1:
        raise ConfigError(f'params: got {count!r}, expected a number of parameters such as "350M"')
    return round(number)


def nearest_depth(values: Mapping[str, Any], given: Collection[str], *, target: int) -> int:
    """Return the depth whose number of parameters is nearest to ``target`` (smallest ratio)."""
    best, off = 1, math.inf
    for depth in range(1, MAX_DEPTH + 1):
        model = _model(values, derive_shape(depth, values, given))
        count = num_parameters(model, values["tokenizer"]["vocab_size"])
        if abs(math.log(count / target)) < off:
            best, off = depth, abs(math.log(count / target))
        if count > target:
            break
    return best


# --- shape --------------------------------------------------------------------------------------------------------


def derive_shape(depth: int, values: Mapping[str, Any], given: Collection[str]) -> dict[str, int]:
    """Return layers, width, heads and feed-forward width; those in ``given`` are not changed.

    The number of heads is a multiple of the tensor-parallel degree.
    """
    model = values["pretrain"]["model"]
    own = {name.removeprefix("pretrain.model.") for name in given}
    tensor = values["pretrain"]["parallel"]["tensor"]
    unit = math.lcm(tensor, model["num_kv_heads"]) if "num_kv_heads" in own else tensor
    head = NARROW_HEAD if ASPECT * depth < WIDE_FROM else WIDE_HEAD
    if "hidden_size" in own:
        width = model["hidden_size"]
    else:
        width = _round_up(ASPECT * depth, 2 * model["num_heads"] if "num_heads" in own else head * unit)
    heads = model["num_heads"] if "num_heads" in own else _divisor(width // 2, near=width / head, multiple_of=unit)
    every_head = model["architecture"] in ("gpt2", "gpt_neox") or model["mla"] is not None
    shape = {
        "num_layers": depth,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": heads if every_head else _divisor(heads, near=heads / QUERIES_PER_KEY, multiple_of=tensor),
        "intermediate_size": _feed_forward(width, model["architecture"], tensor),
    }
    return shape | {name: model[name] for name in shape if name in own}


def _feed_forward(width: int, architecture: str, tensor: int) -> int:
    if architecture in ("gpt2", "gpt_neox"):
        return 4 * width
    return _round_up(8 * width / 3, math.lcm(FEED_FORWARD_MULTIPLE, tensor))


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _divisor(number: int, *, near: float, multiple_of: int) -> int:
    """Return the divisor of ``number`` nearest to ``near`` by ratio; a multiple of ``multiple_of`` if possible."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    fitting = [divisor for divisor in divisors if divisor % multiple_of == 0] or divisors
    return min(fitting, key=lambda divisor: (abs(math.log(divisor / near)), -divisor))


def _model(values: Mapping[str, Any], shape: Mapping[str, int]) -> ModelConfig:
    return _validated(ModelConfig, {**values["pretrain"]["model"], **shape}, "pretrain.model")


# --- training -----------------------------------------------------------------------------------------------------


def derive_training(model: ModelConfig, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return dotted settings of batch, steps, warmup and learning rate; settings in ``given`` are used where needed."""
    pretrain, vocab_size = values["pretrain"], values["tokenizer"]["vocab_size"]
    seq_len = pretrain["seq_len"] or model.max_seq_len
    tokens = TOKENS_PER_PARAMETER * num_active_parameters(model, vocab_size)
    compute = tokens * training_flops_per_token(model, vocab_size, seq_len=seq_len)
    rows = pretrain["batch_size"]
    if "pretrain.batch_size" not in given:
        parts = _row_parts(pretrain)
        rows = max(1, round(batch_tokens(compute) / seq_len / parts)) * parts
    num_steps = pretrain["num_steps"] if "pretrain.num_steps" in given else math.ceil(tokens / (rows * seq_len))
    return {
        "pretrain.batch_size": rows,
        "pretrain.num_steps": num_steps,
        "pretrain.optimizer.learning_rate": float(f"{learning_rate(compute):.3g}"),
        "pretrain.optimizer.warmup_steps": min(MAX_WARMUP_STEPS, math.ceil(MAX_WARMUP_SHARE * num_steps)),
    }


def batch_tokens(compute: float) -> float:
    """Return tokens per batch for a run of ``compute`` FLOPs (Bi et al. 2024)."""
    return 0.2920 * compute**0.3271


def learning_rate(compute: float) -> float:
    """Return AdamW's peak learning rate for a run of ``compute`` FLOPs (Bi et al. 2024)."""
    return 0.3118 * compute**-0.1250


def _check_count(name: str, values: Mapping[str, Any]) -> None:
    value: Any = values
    for part in name.split("."):
        value = value[part]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number above 0")


def _row_parts(pretrain: Mapping[str, Any]) -> int:
    """Return the number that the rows of a batch must be a multiple of."""
    parallel = _validated(ParallelConfig, pretrain["parallel"], "pretrain.parallel")
    try:
        return parallel.layout(pretrain["num_workers"]).data * pretrain["accumulation_steps"]
    except ValueError as error:
        raise ConfigError(f"pretrain: {error}") from error


def _validated(section: type[Section], values: Mapping[str, Any], where: str) -> Any:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error).splitlines())) from error
