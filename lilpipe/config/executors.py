"""Clusters that run the tasks of the data stages."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from lilpipe.config.section import Section


class SlurmConfig(Section):
    """Options of `sbatch` for the tasks of the data stages. The store must be on a file system shared by all nodes."""

    partition: str = "cpu"
    time: str = "24:00:00"
    """Time limit of a job, which runs several tasks one after the other."""
    cpus_per_task: PositiveInt = 1
    """CPUs per job."""
    memory_per_cpu_gb: PositiveInt = 4
    """Memory per CPU."""
    sbatch: dict[str, str] = {}
    """Further options of `sbatch`, such as `account`."""
    poll_seconds: PositiveFloat = 5.0
    """Interval of checks whether tasks have finished."""


class RayConfig(Section):
    """Ray cluster of the data stages."""

    address: str | None = None
    """Address of a running cluster; if None, start one on this host."""
    cpus_per_task: PositiveInt = 1
    """CPUs per task."""
    memory_per_cpu_gb: PositiveFloat = 2
    """Memory per CPU."""
