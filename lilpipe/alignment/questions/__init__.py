"""Prompts with verifiable answers: generated families, data sets, and the stage that splits them."""
