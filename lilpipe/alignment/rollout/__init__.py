"""Sampling and scoring of completions: rollouts, rejection sampling."""
