"""Byte-level BPE training, encoding of text to token ids, and chat templates."""
