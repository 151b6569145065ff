"""Executors of the data tasks: local processes, Slurm, Ray."""
