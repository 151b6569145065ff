"""Preferences to tokens: tools in their prompts, and rows that a template cannot show."""

import json

from lilpipe.alignment.preference.data import encode_completion, encode_examples, encode_pairs
from lilpipe.alignment.rewards.reward_model import encode_rankings
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import Pair, UnpairedExample
from lilpipe.stage import Workspace
from lilpipe.training.conversation_encoding import encode_conversation
from tests.training.test_conversation_encoding import CALLED, TOOLS, chatml

PLAIN: list[Message] = [{"role": "user", "content": "a"}]
PAIRS = [
    Pair("plain", "train", PLAIN, "b", "c"),
    Pair("tools", "train", PLAIN, "b", "c", tools=TOOLS),
    Pair("called", "train", CALLED[:3], "b", "c"),
]


def test_pairs_with_tools_are_skipped_and_counted_under_our_own_template(tokenizer, tmp_path):
    rows, skipped = encode_pairs(tokenizer, PAIRS, max_len=999)
    assert [row.prompt_id for row in rows] == ["plain"]
    assert skipped == {"rejected_by_template": ["tools", "called"]}
    examples = [UnpairedExample(pair.prompt_id, "train", pair.prompt, "b", True, tools=pair.tools) for pair in PAIRS]
    kept, skipped = encode_examples(tokenizer, examples, max_len=999)
    assert [example.prompt_id for example, _ in kept] == ["plain"]
    assert skipped == {"rejected_by_template": ["tools", "called"]}
    workspace = Workspace(tmp_path)
    rankings = encode_rankings(tokenizer, PAIRS, workspace, split="train", max_len=999)
    assert [ranking.prompt_id for ranking in rankings] == ["plain"]
    entries = [json.loads(line) for line in (workspace.report / "rejected_train.jsonl").read_text().splitlines()]
    assert [entry["prompt_id"] for entry in entries] == ["tools", "called"]
    assert "own chat template cannot show" in entries[0]["error"]


def test_the_prompt_of_a_preference_shows_tools_calls_and_results():
    tokenizer = chatml()
    encoded = encode_completion(tokenizer, CALLED[:3], "Half past.", tools=TOOLS)
    whole: list[Message] = [*CALLED[:3], {"role": "assistant", "content": "Half past."}]
    shown = encode_conversation(tokenizer, Conversation("called", "prompt", "mine", whole, tools=TOOLS))
    assert [*encoded.prompt, *encoded.completion] == shown.ids
    assert tokenizer.decode(encoded.completion) == "Half past.<|im_end|>"
    assert '<call>{"name": "time"' in tokenizer.decode(encoded.prompt)
