"""Evaluation of models: bits per byte, accuracy, pass@k, win rate."""
