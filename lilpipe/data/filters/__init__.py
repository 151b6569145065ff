"""Document filters: each judges or changes single documents."""
