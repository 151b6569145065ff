"""Estimate of a pretraining run before it starts: parameters, tokens, FLOPs, time, cost and memory.

Time is model FLOPs (``lilpipe.model.flops``) / (devices x peak x MFU), with the MFU of `pretrain.budget`. Validation,
checkpoints and restarts are extra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from lilpipe.config.phases import Phase
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.devices import Device, device_at_hand, get_device
from lilpipe.model.flops import Recomputed, num_active_parameters, num_parameters, training_flops_per_token
from lilpipe.page import Cell
from lilpipe.training.memory import STANDING, Term, peak_memory, total

GIBI = 2**30
SPARE_MEMORY = 0.05
"""Share of a device's memory for the context, the collectives and allocator fragmentation."""
_UNITS = {
    "num_parameters": ("parameters", 1),
    "tokens": ("tokens", 1),
    "tokens_per_second": ("tokens/s", 1),
    "seconds": ("time in steps, s", 1),
    "mfu": ("MFU", 1),
    "cost": ("cost", 1),
    "peak_memory_bytes": ("peak memory per worker, MiB", 2**20),
}
"""Quantities that can be compared with the plan: label and unit in a report."""


@dataclass(frozen=True)
class Budget:
    """Estimate of one pretraining run; see ``budget``."""

    num_parameters: int
    num_active_parameters: int
    num_steps: int
    tokens: int
    flops: float
    """Model FLOPs of the whole run, without recomputation."""
    executed_flops: float
    """FLOPs with the recomputation of activation checkpointing."""
    device: Device
    peak: float
    """FLOP/s of one device in the run's arithmetic."""
    num_devices: int
    mfu: float
    price_per_hour: float
    memory: tuple[Term, ...]
    """Memory of the worker that needs most; the terms sum to it."""
    remedies: tuple[str, ...]
    """Settings that would reduce memory."""

    @property
    def seconds(self) -> float:
        """Time in steps."""
        return self.flops / (self.num_devices * self.peak * self.mfu)

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """Price of all devices for that time."""
        return self.num_devices * self.seconds / 3600 * self.price_per_hour

    @property
    def peak_memory_bytes(self) -> float:
        """Peak memory of the worker that needs most."""
        return total(self.memory)

    @property
    def warnings(self) -> list[str]:
        """Reasons why the run cannot work."""
        free = self.device.memory_bytes * (1 - SPARE_MEMORY)
        if self.peak_memory_bytes <= free:
            return []
        return [
            f"peak memory {gib(self.peak_memory_bytes)} exceeds the {gib(free)} that {self.device.name} has for "
            f"one worker ({gib(self.device.memory_bytes)} minus {SPARE_MEMORY:.0%}): {'; or '.join(self.remedies)}"
        ]

    def lines(self) -> list[tuple[str, str, str]]:
        """Return name, value and calculation of each quantity."""
        active = self.num_active_parameters
        per_token = self.flops / self.tokens
        again = self.executed_flops / self.flops - 1
        rate = f"{self.num_devices} x {self.device.name} x {self.peak:.3g} FLOP/s x MFU {self.mfu:.2g}"
        recomputed = f"; {again:.0%} more with recomputation" if again else ""
        return [
            ("parameters", f"{self.num_parameters:,}", f"{active:,} active per token"),
            ("tokens", f"{self.tokens:,}", f"{self.tokens / active:.3g} per parameter"),
            ("steps", f"{self.num_steps:,}", f"{self.tokens / self.num_steps:,.0f} tokens per step"),
            ("FLOPs", f"{self.flops:.3g}", f"{per_token:.3g} x {self.tokens:,} tokens{recomputed}"),
            ("time", _duration(self.seconds), f"{self.flops:.3g} / ({rate})"),
            ("tokens/s", f"{self.tokens_per_second:,.0f}", self.device.source),
            (
                "cost",
                f"{self.cost:,.2f}",
                f"{self.num_devices} x {_duration(self.seconds)} x {self.price_per_hour:g}/h",
            ),
            *((term.name, gib(term.bytes), term.arithmetic) for term in self.memory),
            ("peak memory per worker", gib(self.peak_memory_bytes), f"of {gib(self.device.memory_bytes)}"),
        ]


def budget(config: PretrainConfig, vocab_size: int) -> Budget:
    """Return the estimate of a run. Raises ``ConfigError`` for a device that is unknown or lacks the precision."""
    settings, model = config.budget, config.model
    if not settings.mfu:
        raise ConfigError("pretrain.budget.mfu: got 0, expected a ratio above 0, such as 0.4")
    processes = -(-config.num_workers // config.launch.num_nodes)
    named = get_device(settings.device) if settings.device else None
    device = named or device_at_hand(num_threads=config.threads_per_worker, num_processes=processes)
    memory = peak_memory(config, vocab_size, on_cpu=device.name == "cpu")
    return Budget(
        num_parameters=num_parameters(model, vocab_size),
        num_active_parameters=num_active_parameters(model, vocab_size),
        num_steps=config.num_steps,
        tokens=sum(_tokens(phase) for phase in config.resolved_phases),
        flops=_flops(config, vocab_size, "none"),
        executed_flops=_flops(config, vocab_size, config.activation_checkpointing),
        device=device,
        peak=device.peak(config.precision),
        num_devices=config.num_workers,
        mfu=settings.mfu,
        price_per_hour=settings.price_per_hour,
        memory=memory,
        remedies=tuple(_remedies(config, memory)),
    )


def _tokens(phase: Phase) -> int:
    return (phase.stop - phase.first) * phase.batch_size * phase.seq_len


def _flops(config: PretrainConfig, vocab_size: int, recomputed: Recomputed) -> float:
    """Return the FLOPs of the whole run, each phase at its sequence length."""
    return float(
        sum(
            _tokens(phase)
            * training_flops_per_token(config.model, vocab_size, seq_len=phase.seq_len, recomputed=recomputed)
            for phase in config.resolved_phases
        )
    )


def _remedies(config: PretrainConfig, memory: tuple[Term, ...]) -> list[str]:
    """Return settings that reduce memory, ordered by the size of the terms that they divide."""
    sizes = {term.name: term.bytes for term in memory}
    rows = max(p.batch_size // (config.layout.data * p.accumulation_steps) for p in config.resolved_phases)
    standing = math.fsum(sizes[name] for name in STANDING)
    options = {f"increase parallel.shard from {config.layout.shard}, with more workers": standing}
    activations = sizes.get("activations", 0.0)
    if config.activation_checkpointing != "full":
        options["set activation_checkpointing to 'selective' or 'full'"] = activations
    if rows > 1:
        options[f"increase accumulation_steps: a micro-batch has {rows} rows"] = activations
    else:
        options["increase parallel.context or parallel.tensor: a micro-batch is already one row"] = activations
    if "gathered gradients" in sizes:
        options["reduce accumulation_steps to 1: in between, FSDP keeps unsharded gradients"] = sizes[
            "gathered gradients"
        ]
    return sorted(options, key=lambda option: -options[option])


def budget_table(plan: Budget, *, title: str) -> Table:
    """Return the estimate as a table for a terminal."""
    table = Table(title=title, title_justify="left")
    for header, justify in (("", "left"), ("planned", "right"), ("arithmetic", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for name, value, arithmetic in plan.lines():
        section = name in ("cost", plan.memory[-1].name)
        table.add_row(escape(name), escape(value), escape(arithmetic), end_section=section)
    return table


def planned_beside_actual(plan: Budget, actual: Mapping[str, float]) -> list[dict[str, Cell]]:
    """Return rows of a report's table of estimated and measured values.

    ``actual`` maps any of num_parameters, tokens, tokens_per_second, seconds, mfu, cost and peak_memory_bytes to its
    measured value.
    """
    rows: list[dict[str, Cell]] = []
    for name, (label, unit) in _UNITS.items():
        if name in actual:
            planned, measured = float(getattr(plan, name)) / unit, actual[name] / unit
            ratio = measured / planned if planned else None
            rows.append({"": label, "planned": planned, "actual": measured, "actual / planned": ratio})
    return rows


def gib(count: float) -> str:
    """Format bytes."""
    return f"{count / GIBI:,.2f} GiB" if count >= GIBI / 10 else f"{count / 2**20:,.2f} MiB"


def _duration(seconds: float) -> str:
    """Format seconds."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
