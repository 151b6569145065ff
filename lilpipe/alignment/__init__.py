"""Post-training: verifiable prompts, rejection sampling, preferences, reward models, DPO, GRPO, PPO."""
