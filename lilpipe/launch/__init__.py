"""Launchers: start, monitor, restart and stop the processes of a stage, on this host, Slurm or Kubernetes."""

from lilpipe.errors import StageFailure
from lilpipe.launch.processes import die_with_parent
from lilpipe.launch.run import launch

__all__ = ["StageFailure", "die_with_parent", "launch"]
