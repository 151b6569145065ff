"""Completions sampled from a policy and scored: rollouts, rejection sampling."""
