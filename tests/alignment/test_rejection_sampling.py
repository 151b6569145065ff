import pytest

from lilpipe.alignment import completions, rejection_sampling
from lilpipe.alignment.prompts import read_conversations, read_prompts, verify
from lilpipe.alignment.rejection_sampling import run, select
from lilpipe.alignment.tables import read_table
from lilpipe.config import RejectionSamplingConfig, SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import Sample
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

CONFIG = RejectionSamplingConfig(
    seed=0, num_prompts=12, samples_per_prompt=4, prompts_per_chunk=5, sampling=SamplingConfig(max_new_tokens=8)
)


def row(response, *, correct=False, sample=0, reward=0.0, ended=True):
    return {
        "prompt_id": "p",
        "sample": sample,
        "response": response,
        "correct": correct,
        "reward": reward,
        "ended": ended,
    }


@pytest.fixture
def inputs(make_checkpoint, prompts):
    return {"model": make_checkpoint(stage="pretrain"), "prompts": prompts}


@pytest.fixture
def oracle(monkeypatch, prompts, tokenizer):
    """A sampler that solves prompt i in its first i % 5 samples and says nonsense in the others."""
    train = read_prompts(prompts.path, "train")
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_samples, **options):
        answers = {prompt.question: (index % 5, prompt.answer) for index, prompt in enumerate(train)}
        return [
            [
                Sample(
                    tokenizer.encode(f"Sure. Answer: {answers[question][1]}" if k < answers[question][0] else "?"),
                    [],
                    True,
                )
                for k in range(num_samples)
            ]
            for (question,) in encoded
        ]

    monkeypatch.setattr(completions, "generate", generate)
    return train


def kept(rows, **settings):
    return [row["sample"] for row in select(rows, CONFIG.model_copy(update=settings))]


def test_only_correct_answers_are_kept_each_once():
    rows = [
        row("Answer: 2", correct=False),
        row("Answer: 1", correct=True, sample=1),
        row("Answer:  1", correct=True, sample=2),
        row("Sure. Answer: 1", correct=True, sample=3),
    ]
    assert kept(rows) == [1]
    assert kept(rows, max_kept_per_prompt=9) == kept(rows, max_kept_per_prompt=None) == [1, 3]
    assert kept(rows[:1], max_kept_per_prompt=9) == []


REWARDED = [
    row("a", reward=0.2),
    row("b", reward=0.9, sample=1),
    row("cut off", reward=5.0, sample=2, ended=False),
    row("b ", reward=0.9, sample=3),
    row("c", reward=0.9, sample=4),
    row("d", reward=-1.0, sample=5),
]


def test_the_best_answers_that_ended_are_kept_of_equal_ones_the_first():
    assert kept(REWARDED, keep="best") == [1]
    assert kept(REWARDED, keep="best", max_kept_per_prompt=3) == [1, 4, 0]
    assert kept(REWARDED, keep="best", threshold=1.0) == []


def test_answers_above_a_threshold_are_kept_the_highest_first():
    assert kept(REWARDED, keep="threshold", threshold=0.2, max_kept_per_prompt=None) == [1, 4, 0]
    assert kept(REWARDED, keep="threshold", threshold=0.2, max_kept_per_prompt=2) == [1, 4]
    assert kept(REWARDED, keep="threshold", threshold=0.21, max_kept_per_prompt=None) == [1, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "threshold"}, "threshold is not given"),
        ({"threshold": 0.5}, "does not use threshold"),
        ({"keep": "best", "max_kept_per_prompt": None}, "best' of how many"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RejectionSamplingConfig(**settings)


def test_what_is_kept_is_right_and_what_is_counted_is_what_was_planted(tmp_path, inputs, oracle):
    metrics = run(CONFIG, inputs, Workspace(tmp_path))
    correct = [index % 5 for index in range(12)]
    assert metrics["pass_at_1"] == pytest.approx(sum(correct) / 48)
    assert metrics["pass_at_4"] == pytest.approx(sum(count > 0 for count in correct) / 12)
    assert metrics["kept"] == 9
    rates = read_table(tmp_path / "output" / "pass_rates.arrow")
    assert [rate["num_correct"] for rate in rates] == correct
    by_id = {prompt.id: prompt for prompt in oracle}
    conversations = read_conversations(tmp_path / "output")
    assert len(conversations) == 9
    for conversation in conversations:
        prompt = by_id[conversation.prompt_id]
        user, assistant = conversation.messages
        assert user == {"role": "user", "content": prompt.question}
        assert assistant["role"] == "assistant"
        assert verify(prompt, assistant["content"])


def test_every_sample_is_kept_with_its_verdict(tmp_path, inputs, oracle):
    run(CONFIG, inputs, Workspace(tmp_path))
    samples = read_table(tmp_path / "output" / "samples.arrow")
    assert len(samples) == 48
    assert {(sample["response"] == "?") for sample in samples if sample["correct"]} == {False}


def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, inputs, monkeypatch):
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    calls = []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return completions.complete(*args, **options)

    monkeypatch.setattr("lilpipe.alignment.sampling.complete", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert len(calls) == 4  # three chunks, one of them begun twice
    assert digest_of(Workspace(tmp_path / "killed")) == digest_of(Workspace(tmp_path / "whole"))


def test_two_workers_give_the_bytes_of_one(tmp_path, inputs, as_workers):
    one = run(CONFIG, inputs, Workspace(tmp_path / "one"))
    two = as_workers(2, lambda rank: run(CONFIG, inputs, Workspace(tmp_path / "two", rank=rank)))
    assert two == [one, one]
    assert digest_of(Workspace(tmp_path / "two")) == digest_of(Workspace(tmp_path / "one"))


def test_more_prompts_than_there_are_is_refused_with_numbers(tmp_path, inputs):
    with pytest.raises(ConfigError, match="num_prompts: got 61, the train split holds 60"):
        run(CONFIG.model_copy(update={"num_prompts": 61}), inputs, Workspace(tmp_path))


def test_a_model_that_solves_nothing_gives_no_conversations_and_says_so(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    metrics = run(CONFIG, inputs, workspace)
    assert metrics["kept"] == 0
    assert read_conversations(workspace.output) == []
    assert "no sampled answer was correct" in workspace.events.read_text()


def test_held_out_questions_stop_the_stage(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(rejection_sampling, "read_prompts", lambda path, split: read_prompts(path, "dev"))
    with pytest.raises(DataError, match="12 training questions occur"):
        run(CONFIG, inputs, Workspace(tmp_path))
