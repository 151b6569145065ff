"""From small models to larger ones: a dial that derives settings from depth, and a law that predicts the loss."""
