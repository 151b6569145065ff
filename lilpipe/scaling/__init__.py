"""Scaling: settings derived from depth, and a scaling law that predicts the loss of larger models."""
