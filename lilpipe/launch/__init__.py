"""Launchers: start, monitor, restart and stop the processes of a stage, on this host, Slurm or Kubernetes."""
