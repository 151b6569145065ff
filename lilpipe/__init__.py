"""lilpipe: a workflow pipeline from raw documents to an aligned language model."""

__version__ = "0.1.0"
