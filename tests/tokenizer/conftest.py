import pyarrow as pa
import pytest
from hypothesis import strategies as st

from lilpipe.schemas.tables import write_table
from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import special_tokens
from tests import artifacts

PROSE = [
    "The quick brown fox jumps over the lazy dog, and then the other dogs jump over the fox.",
    "Exercise: sort 12, 7 and 19.\nSolution: 7, 12, 19\n\n" * 3,
    "aaaa aaaaaa baaa aaab\n\n\n   indented\n\ttabs  and   runs of spaces   \r\n",
    "Zażółć gęślą jaźń. Жили-были дед и баба. 人工知能は面白い。 नमस्ते दुनिया 👩‍👩‍👧‍👦 é é",
    "def function(self, value):\n    return self.value == value  # don't\n",
]

# Text as it comes: any code point, what the training text is made of, and what looks like special tokens.
FAMILIAR = [
    *("the", " fox", "aaaa", "baaa", "aaab", "12", " 7", " 2024", "HelloWorld", " I'LL", "'s", "don't", ","),
    *("\n", "\r\n", "  ", "\t", "\u2028", "é", "人工", "👩\u200d👩\u200d👧\u200d👦", "नमस्ते"),
]
TEXT = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(FAMILIAR), st.sampled_from(special_tokens())), max_size=12
).map("".join)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(PROSE * 3, vocab_size=420)


def corpus_of(path, rows):
    """A Corpus artifact of rows, of which those columns alone are written that the stage reads."""
    columns = {name: [row.get(name, "") for row in rows] for name in ("source", "label", "language", "text")}
    write_table(path / "documents" / "00000.arrow", pa.table(columns))
    return artifacts.artifact(path)
