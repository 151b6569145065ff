"""Learning from preferences: pairs, DPO and its family."""
