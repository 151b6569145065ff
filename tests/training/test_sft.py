import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilpipe.alignment.prompts import Conversation, read_conversations, read_prompts, write_conversations
from lilpipe.artifact import content_digest, list_files
from lilpipe.config import ModelConfig, OptimizerConfig, PromptsConfig, SFTConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace, get_stage
from lilpipe.tokenizer.chat_template import Message
from lilpipe.training import sft
from lilpipe.training.sft import Example
from tests.alignment.conftest import as_artifact

MODEL = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=64)


def talk(number, question, answer):
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(f"talk/{number}", f"prompt/{number}", "sampled", messages)


TALKS = [talk(number, f"say {number % 5}", f"Answer: {number % 5}") for number in range(20)]


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    model = Transformer(MODEL, tokenizer.vocab_size)
    model.init_weights(0)
    directory = tmp_path_factory.mktemp("base")
    save_model(model, tokenizer, directory)
    return as_artifact(directory, kind="Checkpoint")


@pytest.fixture
def conversations(tmp_path):
    def make(talks):
        directory = tmp_path / f"conversations{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        write_conversations(directory / "conversations.arrow", talks)
        return as_artifact(directory, kind="Conversations")

    return make


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("prompts"))
    config = PromptsConfig(
        num_documents=0, num_demonstrations=12, num_train=6, num_dev=6, num_test=6, max_filler_sentences=0
    )
    get_stage("prompts").run(config, {}, workspace)
    return as_artifact(workspace.output, kind="Prompts")


def config(**settings):
    values = {
        "seed": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0),
        "num_epochs": 4,
        "batch_size": 4,
        "checkpoint_every": 3,
    }
    return SFTConfig.model_validate({**values, **settings})


def digest(workspace):
    return content_digest(list_files(workspace.output))


# --- the stage ----------------------------------------------------------------------------------------------------


def test_fine_tuning_learns_the_answers_and_says_how_it_went(base, conversations, tmp_path):
    workspace = Workspace(tmp_path / "work")
    metrics = sft.run(config(num_epochs=12), {"model": base, "conversations": conversations(TALKS)}, workspace)
    losses = [json.loads(line)["metrics"]["loss"] for line in workspace.events.read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    assert metrics["steps"] == 60
    assert metrics["conversations"] == 20
    # Each conversation: 2 headers, "say N", an end; then "Answer: N" and its end, which are learnt.
    assert metrics["supervised_share"] == pytest.approx(10 / 18)
    load_model(workspace.output)
    page = (workspace.report / "report.html").read_text()
    assert '<mark style="background:#d5e8d4">Answer: 0&lt;|end_of_turn|&gt;</mark>' in page


def test_demonstrations_come_in_to_their_limit(base, prompts, conversations, tmp_path):
    inputs = {"model": base, "prompts": prompts, "conversations": conversations(TALKS)}
    all_of_them = sft.gather_conversations(inputs, max_demonstrations=None)
    assert [item.origin for item in all_of_them] == ["sampled"] * 20 + ["demonstration"] * 12
    assert len(sft.gather_conversations(inputs, max_demonstrations=5)) == 25
    metrics = sft.run(config(num_epochs=1), {"model": base, "prompts": prompts}, Workspace(tmp_path / "work"))
    assert metrics["demonstrations"] + metrics["too_long"] >= 12


def test_a_run_killed_between_steps_ends_in_the_same_bytes(base, conversations, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    inputs = {"model": base, "conversations": conversations(TALKS)}
    whole, cut = Workspace(tmp_path / "whole"), Workspace(tmp_path / "cut")
    sft.run(config(), inputs, whole)
    collate, calls = sft.collate, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return collate(*args, **options)

    monkeypatch.setattr(sft, "collate", dying)
    with pytest.raises(Killed):
        sft.run(config(), inputs, cut)
    sft.run(config(), inputs, cut)
    assert len(calls) == 8 + 20 - 6
    assert digest(cut) == digest(whole)


# --- masks and batches --------------------------------------------------------------------------------------------


def test_the_loss_is_transformers_loss_with_prompt_and_padding_labelled_out(base, tokenizer):
    talks = [talk(0, "a", "b"), talk(1, "a longer question", "c"), talk(2, "q", "a longer answer")]
    examples, _ = sft.encode(tokenizer, talks, max_len=64)
    model, _ = load_model(base.path)
    got = sft.supervised_loss(examples, batch_size=3, seed=0, padding_id=tokenizer.padding_id)(model, 0, 0)
    length = max(len(example.ids) for example in examples)
    ids = torch.full((3, length), tokenizer.padding_id)
    labels = torch.full((3, length), -100)
    for row, item in enumerate(talks):
        prompt = [tokenizer.user_id, *tokenizer.encode(item.messages[0]["content"]), tokenizer.turn_end_id]
        prompt.append(tokenizer.assistant_id)
        answer = [*tokenizer.encode(item.messages[1]["content"]), tokenizer.turn_end_id]
        ids[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    theirs = AutoModelForCausalLM.from_pretrained(base.path)
    attention = (ids != tokenizer.padding_id).long()
    expected = theirs(input_ids=ids, attention_mask=attention, labels=labels).loss
    assert got.count == (labels != -100).sum()
    assert got.total.item() / got.count == pytest.approx(expected.item(), abs=1e-5)


def test_a_batch_is_padded_on_the_right_and_targets_are_shifted():
    batch = [Example("a", [1, 2, 3, 4], [False, False, True, True]), Example("b", [5, 6], [False, True])]
    inputs, targets = sft.collate(batch, padding_id=9)
    assert inputs.tolist() == [[1, 2, 3], [5, 9, 9]]
    assert targets.tolist() == [[-100, 3, 4], [6, -100, -100]]


def test_each_epoch_shows_each_conversation_once_in_an_order_of_its_own(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "collate", lambda batch, **_: seen.append([e.id for e in batch]) or _one_row())
    examples, _ = sft.encode(tokenizer, TALKS, max_len=64)
    loss = sft.supervised_loss(examples, batch_size=5, seed=1, padding_id=0)
    for step in range(8):
        loss(torch.nn.Embedding(4, 4), step, 0)
    epochs = [[name for names in part for name in names] for part in (seen[:4], seen[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(item.id for item in TALKS)
    assert epochs[0] != epochs[1]


def _one_row():
    return torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)


def test_the_gate_passes_what_the_template_renders(tokenizer):
    system: Message = {"role": "system", "content": "be brief"}
    many = replace(TALKS[0], messages=[system, *TALKS[0].messages, *TALKS[1].messages])
    examples, _ = sft.encode(tokenizer, [many, *TALKS], max_len=200)
    assert 0 < sft.check_masks(tokenizer, examples) < 1


def _with_mask(example, position, value):
    mask = list(example.mask)
    mask[position] = value
    return replace(example, mask=mask)


PLANTED = {
    "a prompt token supervised": lambda e: _with_mask(e, 2, True),
    "the header supervised": lambda e: _with_mask(e, e.mask.index(True) - 1, True),
    "the end of the turn not supervised": lambda e: _with_mask(e, -1, False),
    "an answer's token not supervised": lambda e: _with_mask(e, -3, False),
    "nothing supervised": lambda e: replace(e, mask=[False] * len(e.mask)),
    "everything supervised": lambda e: replace(e, mask=[True] * len(e.mask)),
    "no end of the turn": lambda e: replace(e, ids=e.ids[:-1], mask=e.mask[:-1]),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_gate_refuses(tokenizer, fault):
    examples, _ = sft.encode(tokenizer, TALKS, max_len=64)
    examples[7] = PLANTED[fault](examples[7])
    with pytest.raises(DataError, match="talk/7"):
        sft.check_masks(tokenizer, examples)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_conversations_that_are_too_long_are_left_out_counted_and_listed(base, conversations, tmp_path):
    source = conversations([*TALKS, talk(99, "q", "x" * 70)])
    workspace = Workspace(tmp_path / "work")
    metrics = sft.run(config(num_epochs=1), {"model": base, "conversations": source}, workspace)
    assert metrics["too_long"] == 1
    assert metrics["conversations"] == 20
    line = json.loads((workspace.report / "too_long.jsonl").read_text())
    assert line == {"id": "talk/99", "tokens": 75, "max": 64}


def test_conversations_that_are_all_too_long_are_an_error(base, conversations, tmp_path):
    source = conversations([talk(99, "q", "x" * 70)])
    with pytest.raises(DataError, match=r"longer than the model's 64 tokens \(the shortest has 75\)"):
        sft.run(config(), {"model": base, "conversations": source}, Workspace(tmp_path / "work"))


def test_no_conversations_at_all_are_an_error(base, prompts, tmp_path):
    inputs = {"model": base, "prompts": prompts}
    with pytest.raises(DataError, match="got no conversations"):
        sft.run(config(max_demonstrations=0), inputs, Workspace(tmp_path / "work"))


def test_fewer_conversations_than_a_batch_are_an_error(base, conversations, tmp_path):
    with pytest.raises(DataError, match="got 3 conversations, expected at least one batch of 4"):
        sft.run(config(), {"model": base, "conversations": conversations(TALKS[:3])}, Workspace(tmp_path / "work"))


def test_a_batch_that_the_workers_cannot_share_is_an_error():
    with pytest.raises(ConfigError, match=r"sft.batch_size: got 5, expected a multiple of num_workers 2"):
        sft.count_steps(config(batch_size=5, num_workers=2), 20)


@pytest.mark.parametrize("split", ["test", "dev"])
def test_a_held_out_question_is_refused(base, prompts, conversations, tmp_path, split):
    question = read_prompts(prompts.path, split)[0].question
    inputs = {"model": base, "prompts": prompts, "conversations": conversations([*TALKS, talk(50, question, "b")])}
    with pytest.raises(DataError, match="occur in the dev or test split"):
        sft.run(config(), inputs, Workspace(tmp_path / "work"))
    assert read_conversations(prompts.path)
