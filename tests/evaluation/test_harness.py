"""Our adapter against the harness's own model of transformers, on tasks in files of this test."""

import json
import logging
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lilpipe.cli import app
from lilpipe.config.model import ModelConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import save_model
from tests.model.checkpoints import small_model, small_tokenizer

lm_eval = pytest.importorskip("lm_eval")
harness = pytest.importorskip("lilpipe.evaluation.harness")

CONFIG = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=96)

CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "the"
generation_kwargs: {{until: ["\\n", "zz"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
WORDS = ["the thing", "in a ring", "thinning", "12 things", "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(CONFIG), small_tokenizer(), directory)
    return directory


def write_tasks(folder, *, more_questions=(), texts):
    """Write the three task files, twelve questions and more, and the texts."""
    for name, task in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    questions = [
        {"question": f"{WORDS[n % 5]} {n} is ", "choices": [WORDS[(n + k) % 5] for k in range(3)], "answer": n % 3}
        for n in range(12)
    ]
    rows_of = {"choices": [*questions, *more_questions], "texts": [{"text": text} for text in texts]}
    for name, rows in rows_of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    longer_than_the_model_takes = {"question": "long " * 60, "choices": WORDS[:3], "answer": 1}
    texts = [" ".join(WORDS) * repeats for repeats in (1, 3, 9)]
    write_tasks(folder, more_questions=[longer_than_the_model_takes], texts=texts)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def evaluate(model, folder, **options):
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    results: Any = lm_eval.simple_evaluate(
        model=model, tasks=["choices", "answers", "texts"], task_manager=manager, bootstrap_iters=0, **options
    )
    return results


def test_results_are_those_of_the_harness_on_the_exported_model(checkpoint, folder):
    model, tokenizer = harness.load_frozen(checkpoint)
    ours = evaluate(harness.HarnessModel(model, tokenizer, batch_size=4), folder)
    theirs = evaluate("hf", folder, model_args={"pretrained": str(checkpoint)}, device="cpu", batch_size=4)
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours["results"][task][name] == expected, (task, name)
        for our_sample, their_sample in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for got, wanted in zip(our_sample["resps"], their_sample["resps"], strict=True):
                assert_same(got[0], wanted[0])
    assert {sample["resps"][0][0] for sample in ours["samples"]["answers"]} != {""}


def assert_same(got, wanted):
    """Text, or a log-likelihood, alone or with whether it is greedy."""
    if isinstance(wanted, tuple):
        assert got[1] == wanted[1]
        got, wanted = got[0], wanted[0]
    assert got == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-4))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_score_does_not_depend_on_its_batch(checkpoint, folder, batch_size):
    model, tokenizer = harness.load_frozen(checkpoint)
    requests = [(None, tokenizer.encode("the thing"), tokenizer.encode(word)) for word in WORDS]
    scores = harness.HarnessModel(model, tokenizer, batch_size=batch_size)._loglikelihood_tokens(requests)
    for (_, context, continuation), (got, _) in zip(requests, scores, strict=True):
        row = torch.tensor([context + continuation])
        logprobs = model(row)[0].log_softmax(-1)
        places = range(len(context) - 1, row.shape[1] - 1)
        expected = sum(logprobs[place, row[0, place + 1]].item() for place in places)
        assert got == pytest.approx(expected, rel=1e-5)


def test_a_conversation_in_writing_has_the_ids_of_its_template(checkpoint):
    from lilpipe.tokenizer.chat_template import render

    model, tokenizer = harness.load_frozen(checkpoint)
    adapter = harness.HarnessModel(model, tokenizer)
    messages: list[Any] = [{"role": "user", "content": "the thing"}]
    text = adapter.apply_chat_template(messages)
    assert adapter.tok_encode(text) == render(tokenizer, messages, add_generation_prompt=True)[0]
    messages.append({"role": "assistant", "content": "is"})
    assert adapter.apply_chat_template(messages, add_generation_prompt=False) == text + "is"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 96}, "max_gen_toks: got 96, expected less than max_seq_len = 96"),
        ({"max_gen_toks": 8, "num_beams": 4}, "generation_kwargs: got num_beams"),
    ],
)
def test_settings_of_sampling_that_cannot_be_kept_are_refused(checkpoint, settings, message):
    adapter = harness.HarnessModel(*harness.load_frozen(checkpoint))
    with pytest.raises(ConfigError, match=message):
        list(adapter._complete(["the"], settings))


def test_a_continuation_that_the_model_cannot_take_is_refused(checkpoint):
    adapter = harness.HarnessModel(*harness.load_frozen(checkpoint))
    with pytest.raises(DataError, match="a continuation of 97 tokens: the model takes at most max_seq_len = 96"):
        adapter._loglikelihood_tokens([(None, [1], [2] * 97)])


def test_the_command_prints_a_table_and_refuses_an_unknown_task(checkpoint, folder, monkeypatch):
    monkeypatch.setattr(harness, "TaskManager", only_included)  # to list the harness's own tasks takes long
    arguments = ["harness", str(checkpoint), "--include-path", str(folder), "--limit", "3", "--task"]
    result = CliRunner().invoke(app, [*arguments, "choices"])
    assert result.exit_code == 0, result.output
    assert "|choices|" in result.output.replace(" ", "")
    result = CliRunner().invoke(app, [*arguments, "no_such_task"])
    assert isinstance(result.exception, ConfigError)
    assert "no_such_task" in str(result.exception)


def only_included(include_path, include_defaults=True):
    return lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)


def test_without_the_extra_the_command_says_how_to_install_it(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lilpipe.evaluation.harness", None)
    result = CliRunner().invoke(app, ["harness", str(checkpoint), "--task", "choices"])
    assert isinstance(result.exception, ConfigError)
    assert "pip install" in str(result.exception)
