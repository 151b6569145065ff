"""Text to token ids: training of byte-level BPE, encoding, and the chat template."""
