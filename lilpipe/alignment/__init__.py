"""From a base model to an aligned one: verifiable prompts, rejection sampling, preferences, DPO, GRPO."""
