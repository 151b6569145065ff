"""Corpus preparation: source readers, language and quality filters, deduplication, the corpus stage."""
