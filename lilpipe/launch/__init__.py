"""How the processes of a stage are started, watched, restarted and ended: here, under Slurm, on Kubernetes."""

from lilpipe.errors import StageFailure
from lilpipe.launch.processes import die_with_parent
from lilpipe.launch.run import launch

__all__ = ["StageFailure", "die_with_parent", "launch"]
