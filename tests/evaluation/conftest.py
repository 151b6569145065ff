from tests.alignment.conftest import as_workers, make_checkpoint, prompts, tokenizer

__all__ = ["as_workers", "make_checkpoint", "prompts", "tokenizer"]
