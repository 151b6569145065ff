"""Reinforcement learning: GRPO and PPO."""
