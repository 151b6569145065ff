"""Where the tasks of the data stages run: local processes, Slurm, Ray."""
