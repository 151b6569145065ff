"""The Prefect task that runs a step of the pipeline."""
