"""From raw sources to a corpus: readers, language and quality filters, deduplication, the corpus stage."""
