"""Training: one loop, shared by pretraining, fine-tuning, preference and policy optimization."""
