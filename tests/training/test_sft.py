import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lilpipe.artifact import content_digest, list_files
from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.digests import digest_file
from lilpipe.errors import DataError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Conversation, read_conversations, read_prompts, write_conversations
from lilpipe.schemas.messages import Message
from lilpipe.stage import Workspace, get_stage
from lilpipe.training import conversation_encoding as module
from lilpipe.training import conversations as gates
from lilpipe.training import sft, supervised
from tests.alignment.conftest import as_artifact
from tests.tokenizer.foreign import with_special_tokens

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
        num_documents=0, num_demonstrations=12, num_train=6, num_validation=6, num_test=6, max_filler_sentences=0
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


def digest_of_weights(workspace):
    return digest_file(workspace.output / "model.safetensors")


# --- the stage ----------------------------------------------------------------------------------------------------


def test_fine_tuning_learns_the_answers_and_says_how_it_went(base, conversations, tmp_path):
    workspace = Workspace(tmp_path / "work")
    metrics = sft.run(config(num_epochs=12), {"model": base, "conversations": conversations(TALKS)}, workspace)
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    losses = [event["metrics"]["loss"] for event in events if "metrics" in event]
    assert losses[-1] < 0.6 * losses[0]
    assert metrics["steps"] == 60
    assert metrics["conversations"] == 20
    # Each conversation: 2 headers, "say N", an end; then "Answer: N" and its end, which are learnt.
    assert metrics["supervised_ratio"] == pytest.approx(10 / 18)
    load_model(workspace.output)
    page = (workspace.report / "report.html").read_text()
    assert "<mark>Answer: 0&lt;|end_of_turn|&gt;</mark>" in page


def test_demonstrations_come_in_to_their_limit(base, prompts, conversations, tmp_path):
    inputs = {"model": base, "prompts": prompts, "conversations": conversations(TALKS)}
    all_of_them = gates.gather_conversations(inputs, max_demonstrations=None)
    assert [item.origin for item in all_of_them] == ["sampled"] * 20 + ["demonstration"] * 12
    assert len(gates.gather_conversations(inputs, max_demonstrations=5)) == 25
    metrics = sft.run(config(num_epochs=1), {"model": base, "prompts": prompts}, Workspace(tmp_path / "work"))
    assert metrics["origin/demonstration"] + metrics["too_long"] >= 12


def test_what_two_rounds_have_kept_is_shown_once(base, conversations):
    again = [*TALKS[:3], Conversation("other", "p0", "sampled", [*TALKS[0].messages[:1], TALKS[1].messages[1]])]
    rounds = (conversations(TALKS), conversations(again))
    found = gates.gather_conversations({"model": base, "conversations": rounds}, max_demonstrations=None)
    assert found == [*TALKS, again[3]]
    twice = conversations([*TALKS, TALKS[0]])  # of one round that is as it was asked for
    assert len(gates.gather_conversations({"model": base, "conversations": twice}, max_demonstrations=None)) == 21


class Killed(BaseException):
    pass


def die_in_call(monkeypatch, number):
    """Let the batch of that number kill the run; gives the calls that were made."""
    collate, calls = supervised.collate, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return collate(*args, **options)

    monkeypatch.setattr(supervised, "collate", dying)
    return calls


def test_a_run_killed_between_steps_ends_in_the_same_bytes(base, conversations, tmp_path, monkeypatch):
    inputs = {"model": base, "conversations": conversations(TALKS)}
    whole, cut = Workspace(tmp_path / "whole"), Workspace(tmp_path / "cut")
    sft.run(config(), inputs, whole)
    calls = die_in_call(monkeypatch, 8)
    with pytest.raises(Killed):
        sft.run(config(), inputs, cut)
    sft.run(config(), inputs, cut)
    assert len(calls) == 8 + 20 - 6
    assert digest(cut) == digest(whole)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_report(monkeypatch):
    """Curves are most of a short run's time."""
    monkeypatch.setattr(sft, "write_report", lambda *args, **options: None)


def test_neither_packing_nor_accumulation_changes_what_is_learnt(base, conversations, tmp_path, no_report):
    talks = [talk(number, "say " + "it " * (number % 4), f"Answer: {number % 5}") for number in range(20)]
    inputs, losses = {"model": base, "conversations": conversations(talks)}, []
    for number, settings in enumerate([{}, {"packing": False}, {"accumulation_steps": 2}]):
        workspace = Workspace(tmp_path / f"work{number}")
        sft.run(config(num_epochs=2, log_every=1, **settings), inputs, workspace)
        events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
        losses.append([event["metrics"]["loss"] for event in events if "metrics" in event])
    assert len(losses[0]) == 10
    assert losses[0] != losses[1]  # the sums are rounded otherwise
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_noise_on_embeddings_changes_training_and_is_the_same_each_time(base, conversations, tmp_path, no_report):
    inputs = {"model": base, "conversations": conversations(TALKS)}
    digests = []
    for number, alpha in enumerate([0.0, 5.0, 5.0]):
        workspace = Workspace(tmp_path / f"work{number}")
        sft.run(config(num_epochs=1, batch_size=10, neftune_noise_alpha=alpha), inputs, workspace)
        digests.append(digest_of_weights(workspace))
    assert digests[0] != digests[1] == digests[2]


def test_adapters_are_merged_into_the_model_and_written_beside_it(base, conversations, tmp_path, no_report):
    workspace = Workspace(tmp_path / "work")
    lora = LoRAConfig(r=4, target_modules=("q_proj", "down_proj"))
    sft.run(config(lora=lora), {"model": base, "conversations": conversations(TALKS)}, workspace)
    before, after = load_model(base.path)[0].state_dict(), load_model(workspace.output)[0].state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    adapters = load_file(workspace.output / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    change = lora.scaling * adapters[name.format("B")] @ adapters[name.format("A")]
    assert torch.linalg.matrix_rank(change) == 4
    expected = before["model.layers.0.self_attn.q_proj.weight"] + change
    torch.testing.assert_close(after["model.layers.0.self_attn.q_proj.weight"], expected)


def test_a_run_with_adapters_and_dropout_killed_between_steps_ends_in_the_same_bytes(
    base, conversations, tmp_path, monkeypatch, no_report
):
    inputs = {"model": base, "conversations": conversations(TALKS)}
    settings = config(num_epochs=2, lora=LoRAConfig(r=2, lora_dropout=0.3), neftune_noise_alpha=5.0)
    whole, cut = Workspace(tmp_path / "whole"), Workspace(tmp_path / "cut")
    sft.run(settings, inputs, whole)
    die_in_call(monkeypatch, 5)
    with pytest.raises(Killed):
        sft.run(settings, inputs, cut)
    sft.run(settings, inputs, cut)
    assert digest(cut) == digest(whole)


def test_origins_are_shown_as_often_as_the_mixture_says(base, prompts, conversations, tmp_path, no_report):
    inputs = {"model": base, "prompts": prompts, "conversations": conversations(TALKS)}
    settings = config(num_epochs=1, mixture={"sampled": 0.25, "demonstration": 2.0})
    metrics = sft.run(settings, inputs, Workspace(tmp_path / "work"))
    assert (metrics["origin/demonstration"], metrics["origin/sampled"]) == (24, 5)
    assert metrics["conversations"] + metrics["too_long"] == 5 + 24


# --- templates ----------------------------------------------------------------------------------------------------

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"""


def chatml(tokenizer):
    """The same vocabulary with other special tokens."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    stated = {"eos_token": "<|im_end|>"}
    ranks, pattern = tokenizer.ranks, tokenizer.pattern
    return with_special_tokens(ranks, pattern, names, document_end=names[0], template=CHATML, names=stated)


def test_transformers_renders_what_was_trained_on_with_the_exported_tokenizer(
    tokenizer, conversations, tmp_path, no_report
):
    other = chatml(tokenizer)
    model = Transformer(MODEL, other.vocab_size)
    model.init_weights(0)
    save_model(model, other, tmp_path / "base")
    base = as_artifact(tmp_path / "base", kind="Checkpoint")
    workspace = Workspace(tmp_path / "work")
    sft.run(config(num_epochs=1), {"model": base, "conversations": conversations(TALKS)}, workspace)
    peer = AutoTokenizer.from_pretrained(workspace.output)
    for example in module.encode(other, TALKS, max_len=64)[0]:
        assert peer.apply_chat_template(example.messages, return_dict=True)["input_ids"] == example.ids
        assert example.ids[-1] == peer.eos_token_id
    stops = json.loads((workspace.output / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [other.document_end_id, peer.eos_token_id]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_conversations_that_are_too_long_are_left_out_counted_and_listed(base, conversations, tmp_path):
    source = conversations([*TALKS, talk(99, "q", "x" * 70)])
    workspace = Workspace(tmp_path / "work")
    metrics = sft.run(config(num_epochs=1), {"model": base, "conversations": source}, workspace)
    assert metrics["too_long"] == 1
    assert metrics["conversations"] == 20
    line = json.loads((workspace.report / "too_long.jsonl").read_text())
    assert line == {"id": "talk/99", "tokens": 75, "max": 64}


def test_texts_weights_and_parts_of_long_conversations_are_trained_on_and_reported(base, tmp_path, conversations):
    """What cannot be used is left out up to a ratio, and listed with its reason."""
    quiet: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.0}]
    loud = [*talk(50, "c", "d" * 20).messages, *talk(50, "e", "f" * 20).messages, *talk(50, "g", "h" * 20).messages]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    others = [
        Conversation("mixed", "p", "mine", [*quiet, *talk(50, "c", "d").messages]),
        Conversation("text", "p", "mine", [], text="Once upon a time."),
        Conversation("long", "p", "mine", loud),
        Conversation("called", "p", "mine", [quiet[0], {"role": "assistant", "content": "", "tool_calls": [call]}]),
    ]
    inputs = {"model": base, "conversations": conversations([*TALKS, *others])}
    workspace = Workspace(tmp_path / "work")
    settings = config(num_epochs=1, excess_length_strategy="split", max_malformed_ratio=0.05)
    metrics = sft.run(settings, inputs, workspace)
    counts = {name: metrics[name] for name in ("conversations", "too_long", "split", "rejected")}
    assert counts == {"conversations": 24, "too_long": 0, "split": 1, "rejected": 1}
    assert json.loads((workspace.report / "split.jsonl").read_text()) == {"id": "long", "tokens": 75, "parts": 2}
    assert "own chat template" in json.loads((workspace.report / "rejected.jsonl").read_text())["error"]
    log = workspace.events.read_text()
    assert "split 1 conversations of more than 64 tokens (report/split.jsonl)" in log
    assert "left out 1 conversations that cannot be used (report/rejected.jsonl)" in log
    with pytest.raises(DataError, match=r"1 of 24 conversations cannot be used, expected at most .* = 1.00%"):
        sft.run(config(), inputs, Workspace(tmp_path / "strict"))


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
    with pytest.raises(ValidationError, match=r"batch_size 5 must be a multiple .* = 2 x 1 x 1 = 2"):
        config(batch_size=5, num_workers=2)


def test_answers_that_are_a_small_share_of_the_tokens_are_an_error(base, conversations, tmp_path):
    source = conversations([talk(number, "q" * 50, "a") for number in range(8)])
    with pytest.raises(DataError, match=r"3.64% of the tokens are supervised, expected at least .* = 10.00%"):
        sft.run(
            config(min_supervised_ratio=0.1), {"model": base, "conversations": source}, Workspace(tmp_path / "work")
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda ids, mask: (ids, [True] * len(mask)), "talk/"),
        (lambda ids, mask: (ids, [*mask[:-1], False]), "talk/"),
        (lambda ids, mask: ([*ids[:-4], ids[-1]], mask[:-3]), "answer 0: .* is supervised, expected 'Answer"),
    ],
    ids=["the prompt supervised", "the end of the turn not supervised", "the answer cut"],
)
def test_rendering_that_would_teach_rubbish_stops_the_stage(base, conversations, tmp_path, monkeypatch, fault, message):
    render = module.render
    monkeypatch.setattr(module, "render", lambda *args, **options: fault(*render(*args, **options)))
    with pytest.raises(DataError, match=message):
        sft.run(config(), {"model": base, "conversations": conversations(TALKS)}, Workspace(tmp_path / "work"))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_held_out_question_is_refused(base, prompts, conversations, tmp_path, split):
    question = read_prompts(prompts.path, split)[0].question
    inputs = {"model": base, "prompts": prompts, "conversations": conversations([*TALKS, talk(50, question, "b")])}
    with pytest.raises(DataError, match="occur in the validation or test split"):
        sft.run(config(), inputs, Workspace(tmp_path / "work"))
    assert read_conversations(prompts.path)
