"""The decoder, its cost, and its Hugging Face form."""
