"""Raw sources of every format as rows: documents, and what is none."""
