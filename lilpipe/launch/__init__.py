"""How the processes of a stage are started, watched, restarted and ended: here, under Slurm, on Kubernetes."""

from lilpipe.errors import StageFailure
from lilpipe.launch.launch import launch
from lilpipe.launch.processes import die_with_parent

__all__ = ["StageFailure", "die_with_parent", "launch"]
