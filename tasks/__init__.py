"""Prefect tasks: one, which runs a step of the pipeline."""
