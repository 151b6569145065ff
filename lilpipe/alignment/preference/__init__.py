"""Preference training: pairs, DPO and variants."""
