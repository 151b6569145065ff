import pytest

from lilpipe.tokenizer.bpe import train

PROSE = [
    "The quick brown fox jumps over the lazy dog, and then the other dogs jump over the fox.",
    "Exercise: sort 12, 7 and 19.\nSolution: 7, 12, 19\n\n" * 3,
    "aaaa aaaaaa baaa aaab\n\n\n   indented\n\ttabs  and   runs of spaces   \r\n",
    "Zażółć gęślą jaźń. Жили-были дед и баба. 人工知能は面白い。 नमस्ते दुनिया 👩‍👩‍👧‍👦 é é",
    "def function(self, value):\n    return self.value == value  # don't\n",
]


@pytest.fixture(scope="session")
def tokenizer():
    return train(PROSE * 3, vocab_size=420)
