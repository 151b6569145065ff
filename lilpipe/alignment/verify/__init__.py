"""Whether an answer is right: parsing, comparing, and running programs in a sandbox."""
