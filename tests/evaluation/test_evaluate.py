import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from markupsafe import escape

from lilpipe.alignment.rollout import completion_rows, completions
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation import evaluate
from lilpipe.evaluation.candidates import as_candidate
from lilpipe.evaluation.evaluate import flat_metrics, run
from lilpipe.generation.engine import CompletionOutput
from lilpipe.metrics.pass_at_k import Estimate
from lilpipe.schemas.examples import read_prompts
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.loader import validation_rows
from lilpipe.tokens.shards import TokenizedDocument, TokenShards, shard_folder, write_index, write_shard
from tests.alignment.conftest import as_artifact, digest_of
from tests.evaluation.judges import judge_config, prefers_shorter, serving
from tests.model.published import publish

CONFIG = EvaluateConfig(
    seed=0, num_generations=3, prompts_per_chunk=8, validation_rows=4, sampling=SamplingConfig(max_new_tokens=6)
)


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
            documents.append(TokenizedDocument(f"{split}/{index}", "corpus", len(ids) - 1, np.array(ids)))
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
    monkeypatch.setattr(evaluate, "write_page", lambda found: "")


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
    assert lines[0]["models"]["sft"]["sampled"].keys() == {"completion", "correct", "rewards", "game"}
    report = (workspace.report / "report.html").read_bytes().decode()
    assert "<svg" in report
    for prompt in lines:
        assert all(escape(model["sampled"]["completion"]) in report for model in prompt["models"].values())
    assert all(model in report for model in ("pretrain", "sft", "dpo"))


def test_a_model_that_knows_the_answers_scores_one_in_every_measure(tmp_path, inputs, no_report, monkeypatch):
    answers = {p.question: p.answer for p in read_prompts(inputs["prompts"].path, "test")}
    tokenizer = Tokenizer.load(inputs["models"][0].path)
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_generations, **options):
        return [
            [CompletionOutput(tokenizer.encode(f"Answer: {answers[q]}"), [], True)] * num_generations
            for (q,) in encoded
        ]

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


def samples(folder):
    return [json.loads(line) for line in (folder / "output" / "samples.jsonl").read_text().splitlines()]


def test_each_reward_is_reported_apart_and_by_answer(tmp_path, inputs):
    rewards = (RewardConfig(kind="answer"), RewardConfig(kind="answer", name="again", weight=-2.0))
    metrics = run(CONFIG.model_copy(update={"rewards": rewards}), inputs, Workspace(tmp_path))
    for name in ("answer", "again", "total"):
        assert {f"reward_{name}/dpo", f"reward_{name}_stderr/dpo", f"reward_{name}_gain/dpo"} <= metrics.keys()
    assert samples(tmp_path)[0]["models"]["dpo"]["sampled"]["rewards"] == {"answer": 0, "again": 0, "total": 0}
    assert "reward again" in (tmp_path / "output" / "report" / "report.html").read_text()


class PrefersLong:
    """A reward model that likes long completions."""

    def score(self, conversations):
        return [float(len(messages[-1]["content"])) for messages in conversations]


def test_a_reward_model_scores_all_completions_and_may_say_who_wins(tmp_path, inputs, no_report, monkeypatch):
    monkeypatch.setattr(completion_rows, "load_reward_model", lambda path, device: PrefersLong())
    config = CONFIG.model_copy(update={"win_by": "reward_model"})
    metrics = run(config, {**inputs, "reward_model": inputs["models"][1]}, Workspace(tmp_path / "scored"))
    for line in samples(tmp_path / "scored"):
        for completion in (*line["models"]["sft"].values(), *line["models"]["dpo"].values()):
            assert completion["rewards"]["reward_model"] == len(completion["completion"])
    assert metrics["reward_reward_model_stderr/sft"] > 0
    assert "reward_total/sft" not in metrics  # it is measured, and does not count in a sum
    assert 0 <= metrics["win_rate/dpo"] <= 1
    with pytest.raises(ConfigError, match=r"evaluate\.win_by: got 'reward_model', but the step has none"):
        run(config, inputs, Workspace(tmp_path / "bare"))


def test_reference_answers_are_no_model_of_the_report(tmp_path, inputs, monkeypatch):
    prompts = [replace(p, reference="Answer: 1") for p in read_prompts(inputs["prompts"].path, "test")]
    monkeypatch.setattr(evaluate, "read_prompts", lambda path, split: prompts)
    config = CONFIG.model_copy(update={"win_against": "answer"})
    metrics = run(config, {**inputs, "reference": ()}, Workspace(tmp_path))
    assert {name.split("/")[1] for name in metrics if "/" in name} == {"pretrain", "sft", "dpo"}
    assert "win_rate/sft" in metrics
    assert "against reference answers" in (tmp_path / "output" / "report" / "report.html").read_text()


def test_prompts_without_a_reference_answer_play_no_game_and_are_counted(tmp_path, inputs, no_report, monkeypatch):
    known = read_prompts(inputs["prompts"].path, "test")
    prompts = [replace(p, reference="Answer: 1" if number % 4 == 0 else "") for number, p in enumerate(known)]
    monkeypatch.setattr(evaluate, "read_prompts", lambda path, split: prompts)
    workspace = Workspace(tmp_path)
    config = CONFIG.model_copy(update={"win_against": "answer"})
    metrics = run(config, {**inputs, "reference": ()}, workspace)
    without = sum(not prompt.reference for prompt in prompts)
    assert metrics["prompts_without_reference"] == without > 0
    played = [line["id"] for line in samples(tmp_path) if "game" in line["models"]["dpo"]["sampled"]]
    assert played == [prompt.id for prompt in prompts if prompt.reference]
    scores = json.loads((workspace.output / "metrics.json").read_text())
    assert scores["models"]["dpo"]["win_rate"]["n"] == len(played)
    assert f"{without} of {len(prompts)} prompts have no reference answer" in workspace.events.read_text()


def test_a_language_model_may_say_who_wins(tmp_path, inputs, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(prefers_shorter) as (address, asked):
        config = CONFIG.model_copy(update={"win_by": "judge", "judge": judge_config(address, num_prompts=6)})
        metrics = run(config, inputs, Workspace(tmp_path))
    assert 0 < len(asked.bodies) <= 2 * 2 * 6
    assert (metrics["flip_rate/dpo"], metrics["unreadable_ratio/dpo"]) == (0, 0)
    endings = [line["models"]["dpo"]["sampled"].get("game") for line in samples(tmp_path)]
    assert set(endings[:6]) <= {"won", "lost", "tie"}
    assert set(endings[6:]) == {None}
    assert metrics["win_rate/dpo"] == pytest.approx((endings.count("won") + endings.count("tie") / 2) / 6)
    assert "tie rate" in (tmp_path / "output" / "report" / "report.html").read_text()


def test_a_judge_needs_something_to_compare_with(tmp_path, inputs):
    config = CONFIG.model_copy(update={"win_by": "judge"})
    with pytest.raises(ConfigError, match=r"evaluate\.win_by: got 'judge', but nothing to compare with; .*`reference`"):
        run(config, {**inputs, "reference": ()}, Workspace(tmp_path))


def test_without_a_rule_nothing_is_compared(tmp_path, inputs, no_report):
    metrics = run(CONFIG.model_copy(update={"win_by": "none"}), inputs, Workspace(tmp_path))
    assert not [name for name in metrics if name.startswith("win_rate")]


def test_a_killed_evaluation_asks_its_judge_nothing_twice(tmp_path, inputs, no_report, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(prefers_shorter) as (address, asked):
        config = CONFIG.model_copy(update={"win_by": "judge", "judge": judge_config(address)})
        run(config, inputs, Workspace(tmp_path / "whole"))
        once, killed = len(asked.bodies), Workspace(tmp_path / "killed")
        asked.failures = [200] * 5 + [403]
        with pytest.raises(ConfigError, match="HTTP 403"):
            run(config, inputs, killed)
        run(config, inputs, killed)
    assert len(asked.bodies) == 2 * once + 1  # the refused one
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


def test_only_what_is_beyond_noise_is_called_better():
    estimates = {"accuracy": Estimate(0.5, 0.1, 25), "win_rate": Estimate(0.58, 0.05, 25)}
    metrics = flat_metrics({"sft": {**estimates, "accuracy_gain": Estimate(0.3, 0.1, 25)}}, {}, num_prompts=25)
    assert metrics["accuracy_gain_beyond_noise/sft"] == 1
    assert metrics["win_rate_beyond_noise/sft"] == 0
    assert "accuracy_beyond_noise/sft" not in metrics


def test_a_model_meets_questions_as_it_did_when_it_was_trained(make_checkpoint):
    zero = make_checkpoint(0, stage="grpo", step="zero")
    zero.manifest.config["prompt_form"] = "text"
    assert (as_candidate(zero).form, as_candidate(zero).is_base) == ("text", False)
    zero.manifest.config["prompt_form"] = "chat"
    assert as_candidate(zero).form == "chat"
    assert as_candidate(make_checkpoint(0, stage="pretrain")).is_base


def test_a_model_of_transformers_is_evaluated(prompts, tokens, tokenizer, tmp_path, no_report):
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 160}
    theirs = publish("opt", tmp_path / "opt", tokenizer=tokenizer, **size)
    model = as_artifact(tmp_path / "opt", kind="Checkpoint", stage="pretrain", step="opt")
    workspace = Workspace(tmp_path / "work")
    metrics = run(CONFIG, {"models": (model,), "prompts": prompts, "tokens": tokens}, workspace)
    inputs_BT, targets_BT, num_bytes = validation_rows(
        TokenShards.open(tokens.path), "corpus", num_rows=CONFIG.validation_rows, seq_len=160
    )
    with torch.no_grad():
        logits_BVT = theirs(inputs_BT).logits.transpose(1, 2)
    bits = torch.nn.functional.cross_entropy(logits_BVT, targets_BT, reduction="sum").item() / math.log(2)
    found = [value for name, value in metrics.items() if "bits_per_byte" in name and "reference" not in name]
    assert found == pytest.approx([bits / num_bytes], rel=1e-5)
