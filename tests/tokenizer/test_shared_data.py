"""Real text in some forty languages, code and tables; skipped where the folder is not there."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lilpipe.tokenizer.bpe import train_tokenizer
from lilpipe.tokenizer.encoding import BytePairTokenizer
from lilpipe.tokenizer.extension import extend
from lilpipe.tokenizer.patterns import PATTERNS

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")

ONE_IN = 60
"""So many texts for each that is looked at under a preset; each preset sees others. The benchmark looks at all."""


@pytest.fixture(scope="module")
def texts():
    files = [gzip.decompress(path.read_bytes()) for path in sorted(SHARED.glob("*.jsonl.gz"))]
    lines = [line for content in files for line in content.splitlines()]
    chosen = [json.loads(line) for line in lines[:: ONE_IN // len(PATTERNS)]]
    return [value for row in chosen for value in row.values() if isinstance(value, str)]


@pytest.mark.parametrize("preset", PATTERNS)
def test_ids_are_those_of_transformers_and_come_back_as_the_text(texts, preset, tmp_path):
    chosen = texts[list(PATTERNS).index(preset) :: len(PATTERNS)]
    tokenizer = train_tokenizer(texts[::10], vocab_size=1_000, pattern=preset)
    tokenizer.save(tmp_path)
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = peer(chosen, split_special_tokens=True).input_ids
    for text, ids in zip(chosen, expected, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_ids_of_an_extension_are_those_of_its_base_with_new_tokens_in_place_of_runs(texts):
    base = train_tokenizer(texts[::20], vocab_size=1_000, pattern="gpt4")
    ranks = extend(texts[::2], base.ranks, 1_000, pattern="gpt4")
    extended, tokens = BytePairTokenizer(ranks, "gpt4"), list(ranks)
    num_new = 0
    for text in texts[::10]:
        old = base.encode(text)
        place = 0
        for new in extended.encode(text):
            start, run = place, b""
            while len(run) < len(tokens[new]):
                run += tokens[old[place]]
                place += 1
            assert run == tokens[new]
            assert (place - start == 1) == (new < len(base.ranks))
            num_new += place - start > 1
        assert place == len(old)
    assert num_new > 1_000
