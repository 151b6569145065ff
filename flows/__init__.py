"""Prefect flows: the full pipeline, and one step of it."""
