"""Tokenizers from elsewhere, against transformers' ids."""
