"""Verification of answers: parsing, comparing, and running programs in a sandbox."""
