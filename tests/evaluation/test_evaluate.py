import json
import math

import numpy as np
import pytest

from lilpipe.alignment import completions
from lilpipe.alignment.prompts import read_prompts
from lilpipe.config import EvaluateConfig, SamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation import evaluate
from lilpipe.evaluation.evaluate import accuracy_gain, run, score, win_rate
from lilpipe.generation.engine import Sample
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.shards import Document, shard_folder, write_index, write_shard
from tests.alignment.conftest import as_artifact, digest_of

CONFIG = EvaluateConfig(
    seed=0, samples_per_prompt=3, prompts_per_chunk=8, validation_rows=4, sampling=SamplingConfig(max_new_tokens=6)
)


def answer(prompt, *, greedy, correct=False, words=1, well_formed=True, family="sort", sample=0):
    return {
        "prompt_id": prompt,
        "family": family,
        "greedy": greedy,
        "sample": sample,
        "correct": correct,
        "well_formed": well_formed,
        "num_words": words,
    }


def games(words):
    """Sampled answers to prompts a, b, ... with these numbers of words; None is malformed."""
    return [
        answer(f"{prompt}", greedy=False, words=count or 0, well_formed=count is not None, sample=sample)
        for prompt, counts in enumerate(words)
        for sample, count in enumerate(counts)
    ]


def test_scores_are_worked_out_over_prompts():
    rows = [answer("a", greedy=True, correct=True), answer("b", greedy=True)]
    rows += [answer("a", greedy=False, correct=c) for c in (True, True, False)]
    rows += [answer("b", greedy=False, correct=False)] * 3
    estimates = score(rows)
    assert (estimates["accuracy"].value, estimates["accuracy"].n) == (0.5, 2)
    assert estimates["accuracy"].stderr == pytest.approx(math.sqrt(0.25 / 2))
    assert estimates["sampled_accuracy"].value == pytest.approx(1 / 3)
    assert estimates["sampled_accuracy"].stderr == pytest.approx(1 / 3)  # two prompts, 2/3 and 0
    assert estimates["pass_at_3"].value == 0.5


def test_the_win_rate_counts_ties_as_half_and_malformed_answers_as_lost():
    assert win_rate(games([[1, 1]]), games([[2, 2]])).value == 1
    assert win_rate(games([[2, 2]]), games([[2, 2]])).value == 0.5
    assert win_rate(games([[9, None]]), games([[None, 1]])).value == (0 + 0.5) / 2  # 9 against 1, both malformed
    assert win_rate(games([[9, None]]), games([[1, None]])).value == (1 + 0) / 2  # against a malformed one, as one
    estimate = win_rate(games([[1, 1], [3, 3]]), games([[2, 2], [2, 2]]))
    assert (estimate.value, estimate.stderr, estimate.n) == (0.5, 0.5, 2)


def test_a_sample_never_meets_the_one_of_its_own_random_stream():
    # Equal models drawing equal samples would tie in each game; here each game has a winner.
    rows = games([[1, 2, 3]])
    assert win_rate(rows, rows).value == pytest.approx(2 / 3)  # 1 < 2, 2 < 3, 3 > 1


def test_a_gain_is_paired_by_prompt():
    before = [answer("a", greedy=True, correct=True), answer("b", greedy=True), answer("c", greedy=True)]
    after = [answer("a", greedy=True, correct=True), answer("b", greedy=True, correct=True), answer("c", greedy=True)]
    gain = accuracy_gain(after, before)
    assert gain.value == pytest.approx(1 / 3)
    assert gain.stderr == pytest.approx(1 / 3)
    assert accuracy_gain(after, after).stderr == 0


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    for split in ("train", "validation"):
        documents = []
        for index in range(20):
            ids = [
                *tokenizer.encode(f"This is text number {index} of the {split} split. " * 2),
                tokenizer.document_end_id,
            ]
            documents.append(Document(f"{split}/{index}", "corpus", len(ids) - 1, np.array(ids)))
        folder = directory / shard_folder("corpus", split)
        write_shard(folder / "00000.arrow", documents, vocab_size=tokenizer.vocab_size, next_document=20)
    tokenizer.save(directory / "tokenizer")
    write_index(directory, tokenizer, ["corpus"])
    return as_artifact(directory, kind="TokenShards")


@pytest.fixture
def inputs(make_checkpoint, prompts, tokens):
    base, sft, dpo = (
        make_checkpoint(seed, stage=stage, step=stage) for seed, stage in enumerate(("pretrain", "sft", "dpo"))
    )
    return {"models": (base, sft, dpo), "reference": sft, "prompts": prompts, "tokens": tokens}


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(evaluate, "_report", lambda *args: "")


def test_the_base_model_is_asked_in_text_and_the_others_in_chat(tmp_path, inputs, no_report, monkeypatch):
    asked = set()
    encode = completions.encode_question

    def spy(tokenizer, question, form):
        asked.add((form, encode(tokenizer, question, form)[0] == tokenizer.user_id))
        return encode(tokenizer, question, form)

    monkeypatch.setattr(completions, "encode_question", spy)
    run(CONFIG, {**inputs, "models": inputs["models"][:1], "reference": ()}, Workspace(tmp_path / "base"))
    assert asked == {("text", False)}
    run(CONFIG, {**inputs, "models": inputs["models"][1:]}, Workspace(tmp_path / "chat"))
    assert asked == {("text", False), ("chat", True)}


def test_metrics_name_every_model_and_the_report_shows_it(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    metrics = run(CONFIG, inputs, workspace)
    for name in ("accuracy", "accuracy_stderr", "sampled_accuracy", "pass_at_3", "bits_per_byte"):
        assert {f"{name}/{model}" for model in ("pretrain", "sft", "dpo")} <= metrics.keys()
    assert "win_rate/pretrain" not in metrics
    assert {"win_rate/sft", "win_rate/dpo", "accuracy_gain/sft"} <= metrics.keys()
    assert metrics["num_prompts"] == 20
    assert 5 < metrics["bits_per_byte/sft"] < 20
    document = json.loads((workspace.output / "metrics.json").read_text())
    assert document["models"]["sft"]["accuracy"] == {"value": 0.0, "stderr": 0.0, "n": 20}
    assert document["models"]["sft"]["by_family"].keys() == {
        p.family for p in read_prompts(inputs["prompts"].path, "test")
    }
    assert document["models"]["dpo"]["bits_per_byte"] == metrics["bits_per_byte/dpo"]
    lines = [json.loads(line) for line in (workspace.output / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[0]["models"].keys() == {"pretrain", "sft", "dpo"}
    assert lines[0]["models"]["sft"].keys() == {"greedy", "sampled"}
    report = (workspace.report / "report.html").read_text()
    assert "<svg" in report
    assert all(model in report for model in ("pretrain", "sft", "dpo"))


def test_a_model_that_knows_the_answers_scores_one_in_every_measure(tmp_path, inputs, no_report, monkeypatch):
    answers = {p.question: p.answer for p in read_prompts(inputs["prompts"].path, "test")}
    tokenizer = Tokenizer.load(inputs["models"][0].path)
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_samples, **options):
        return [[Sample(tokenizer.encode(f"Answer: {answers[q]}"), [], True)] * num_samples for (q,) in encoded]

    monkeypatch.setattr(completions, "generate", generate)
    metrics = run(CONFIG, inputs, Workspace(tmp_path))
    for name in ("accuracy", "sampled_accuracy", "pass_at_3", "well_formed"):
        assert metrics[f"{name}/dpo"] == 1
    assert metrics["win_rate/dpo"] == 0.5
    assert metrics["accuracy_gain/dpo"] == 0
    assert metrics["final_accuracy"] == 1


def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, inputs, no_report, monkeypatch):
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        if done == 5:
            raise KeyboardInterrupt
        progress(done, total, unit, **metrics)

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, killed)
    assert len(list((tmp_path / "killed" / "scratch" / "samples").glob("*.arrow"))) == 5
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


def test_two_workers_give_the_bytes_of_one(tmp_path, inputs, no_report, as_workers):
    one = run(CONFIG, inputs, Workspace(tmp_path / "one"))
    two = as_workers(2, lambda rank: run(CONFIG, inputs, Workspace(tmp_path / "two", rank=rank)))
    assert two == [one, one]
    assert digest_of(Workspace(tmp_path / "two")) == digest_of(Workspace(tmp_path / "one"))


def test_two_models_of_one_name_are_refused(tmp_path, inputs):
    base = inputs["models"][0]
    with pytest.raises(ConfigError, match=r"must come from different steps, got \['pretrain', 'pretrain'\]"):
        run(CONFIG, {**inputs, "models": (base, base)}, Workspace(tmp_path))
