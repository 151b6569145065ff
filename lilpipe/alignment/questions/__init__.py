"""Prompts with verifiable answers: generated families, datasets, and the stage that splits them."""
