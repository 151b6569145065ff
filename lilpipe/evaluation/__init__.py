"""How good a model is: bits per byte, accuracy, pass@k, win rate."""
