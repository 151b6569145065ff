from tests.training.conftest import tokenizer

__all__ = ["tokenizer"]
