import pytest

from lilpipe.alignment.rollout import completion_rows, completions, rejection_sampling
from lilpipe.alignment.rollout.rejection_sampling import run, select
from lilpipe.alignment.verify.verifiers import verify
from lilpipe.config.preferences import RejectionSamplingConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import CompletionOutput
from lilpipe.schemas.examples import read_conversations, read_prompts
from lilpipe.schemas.tables import read_rows
from lilpipe.stage import Workspace
from tests.alignment.conftest import digest_of

CONFIG = RejectionSamplingConfig(
    seed=0, num_prompts=12, num_generations=4, prompts_per_chunk=5, sampling=SamplingConfig(max_new_tokens=8)
)


@pytest.fixture
def no_report(monkeypatch):
    """Drawing takes longer than sampling here."""
    monkeypatch.setattr(rejection_sampling, "_report", lambda *args: "")


def row(completion, *, correct=False, sample=0, reward=0.0, ended=True):
    return {
        "prompt_id": "p",
        "sample": sample,
        "completion": completion,
        "correct": correct,
        "reward": reward,
        "ended": ended,
    }


@pytest.fixture
def inputs(make_checkpoint, prompts, no_report):
    return {"model": make_checkpoint(stage="pretrain"), "prompts": prompts}


@pytest.fixture
def oracle(monkeypatch, prompts, tokenizer):
    """A sampler that solves prompt i in its first i % 5 samples and says nonsense in the others."""
    train = read_prompts(prompts.path, "train")
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_generations, **options):
        answers = {prompt.question: (index % 5, prompt.answer) for index, prompt in enumerate(train)}
        return [
            [
                CompletionOutput(
                    tokenizer.encode(f"Sure. Answer: {answers[question][1]}" if k < answers[question][0] else "?"),
                    [],
                    True,
                )
                for k in range(num_generations)
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
    row("", reward=4.0, sample=6),
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
        ({"keep": "threshold"}, "threshold is not set"),
        ({"threshold": 0.5}, "does not use threshold"),
        ({"keep": "best", "max_kept_per_prompt": None}, "best', but max_kept_per_prompt is None"),
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
    rates = read_rows(tmp_path / "output" / "pass_rates.arrow")
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
    samples = read_rows(tmp_path / "output" / "samples.arrow")
    assert len(samples) == 48
    assert {(sample["completion"] == "?") for sample in samples if sample["correct"]} == {False}


@pytest.mark.parametrize("killed_in", [2, 3])
def test_a_killed_run_samples_no_finished_prompt_again_and_ends_in_the_same_bytes(
    tmp_path, inputs, monkeypatch, killed_in
):
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    train = [prompt.id for prompt in read_prompts(inputs["prompts"].path, "train")[:12]]
    sampled, begun = [], []

    def dying(model, tokenizer, prompts, **options):
        begun.append(1)
        if len(begun) == killed_in:
            raise KeyboardInterrupt
        sampled.extend(prompt.id for prompt in prompts)
        return completions.complete(model, tokenizer, prompts, **options)

    monkeypatch.setattr(completion_rows, "complete", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert sampled == train[: 5 * (killed_in - 1)]
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert sampled == train
    assert digest_of(Workspace(tmp_path / "killed")) == digest_of(Workspace(tmp_path / "whole"))


def test_two_workers_give_the_bytes_of_one(tmp_path, inputs, as_workers):
    one = run(CONFIG, inputs, Workspace(tmp_path / "one"))
    two = as_workers(2, lambda rank: run(CONFIG, inputs, Workspace(tmp_path / "two", rank=rank)))
    assert two == [one, one]
    assert digest_of(Workspace(tmp_path / "two")) == digest_of(Workspace(tmp_path / "one"))


def test_more_prompts_than_there_are_is_refused_with_numbers(tmp_path, inputs):
    with pytest.raises(ConfigError, match="num_prompts: got 61, but the train split has 60"):
        run(CONFIG.model_copy(update={"num_prompts": 61}), inputs, Workspace(tmp_path))


def test_a_model_that_solves_nothing_gives_no_conversations_and_says_so(tmp_path, inputs):
    workspace = Workspace(tmp_path)
    metrics = run(CONFIG, inputs, workspace)
    assert metrics["kept"] == 0
    assert read_conversations(workspace.output) == []
    assert "no sampled completion was correct" in workspace.events.read_text()


def test_held_out_questions_stop_the_stage(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(rejection_sampling, "read_prompts", lambda path, split: read_prompts(path, "validation"))
    with pytest.raises(DataError, match="12 training questions occur"):
        run(CONFIG, inputs, Workspace(tmp_path))


# --- rewards ------------------------------------------------------------------------------------------------------


def test_each_reward_is_kept_and_logged_apart_and_the_sum_decides(tmp_path, inputs, oracle):
    rewards = (RewardConfig(kind="answer", weight=2.0), RewardConfig(kind="regex", name="doubt", pattern=r"\?"))
    config = CONFIG.model_copy(update={"rewards": rewards, "keep": "threshold", "threshold": 1.0})
    config = config.model_copy(update={"max_kept_per_prompt": None})
    metrics = run(config, inputs, Workspace(tmp_path))
    samples = read_rows(tmp_path / "output" / "samples.arrow")
    for sample in samples:
        assert sample["reward/answer"] == float(sample["correct"])
        assert sample["reward/doubt"] == float(sample["completion"] == "?")
        assert sample["reward"] == 2 * sample["reward/answer"] + sample["reward/doubt"]
    assert metrics["reward/answer"] == pytest.approx(metrics["pass_at_1"])
    assert metrics["reward_stderr/answer"] == pytest.approx(metrics["pass_at_1_stderr"])
    assert metrics["reward"] == pytest.approx(2 * metrics["reward/answer"] + metrics["reward/doubt"])
    kept = [item.messages[1]["content"] for item in read_conversations(tmp_path / "output")]
    assert len(kept) == len({(s["prompt_id"], s["completion"]) for s in samples})  # "?" is worth 1, a right answer 2


def test_how_hard_each_prompt_was_is_kept(tmp_path, make_checkpoint, prompts, oracle):
    run(CONFIG, {"model": make_checkpoint(), "prompts": prompts}, Workspace(tmp_path))
    rates = read_rows(tmp_path / "output" / "pass_rates.arrow")
    for index, (rate, prompt) in enumerate(zip(rates, oracle, strict=False)):
        assert rate["difficulty"] == prompt.difficulty
        assert rate["pass_rate"] == rate["mean_reward"] == (index % 5) / 4
        assert rate["num_kept"] == min(index % 5, 1)
    html = (tmp_path / "output" / "report" / "report.html").read_text()
    assert ("By difficulty" in html) == (len({rate["difficulty"] for rate in rates}) > 1)


class LikesLength:
    """A reward model that likes long answers."""

    def score(self, conversations):
        return [float(len(item[-1]["content"])) for item in conversations]


def test_a_reward_model_can_decide(tmp_path, inputs, oracle, monkeypatch, make_checkpoint):
    monkeypatch.setattr(
        "lilpipe.alignment.rollout.completion_rows.load_reward_model", lambda path, device: LikesLength()
    )
    config = CONFIG.model_copy(update={"rewards": (RewardConfig(kind="reward_model"),), "keep": "best"})
    metrics = run(config, {**inputs, "reward_model": make_checkpoint()}, Workspace(tmp_path))
    assert metrics["kept"] == 12  # also where nothing is right, the best of the wrong
    longest = {}
    for sample in read_rows(tmp_path / "output" / "samples.arrow"):
        longest[sample["prompt_id"]] = max(longest.get(sample["prompt_id"], 0), len(sample["completion"]))
        assert sample["reward"] == len(sample["completion"])
    for item in read_conversations(tmp_path / "output"):
        assert len(item.messages[1]["content"]) == longest[item.prompt_id]


def test_a_reward_model_that_is_not_given_is_asked_for(tmp_path, inputs):
    config = CONFIG.model_copy(update={"rewards": (RewardConfig(kind="reward_model"),)})
    with pytest.raises(ConfigError, match="add an input `reward_model`"):
        run(config, inputs, Workspace(tmp_path))


# --- policies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(make_checkpoint, monkeypatch, prompts, tokenizer, no_report):
    """Three checkpoints of which the second alone is always right, and the list of those that were asked to sample."""
    artifacts = tuple(make_checkpoint(seed, step=f"dpo_{seed}") for seed in range(3))
    asked = []
    everything = [prompt for split in ("train", "validation") for prompt in read_prompts(prompts.path, split)]
    answers = {prompt.question: prompt.answer for prompt in everything}
    load = completion_rows.load_frozen

    def remembering(path):
        asked.append(next(artifact.manifest.step for artifact in artifacts if artifact.path == path))
        return load(path)

    def generate(model, encoded, *, num_generations, **options):
        right = asked[-1] == "dpo_1"
        text = {q: f"Answer: {answers[q]}" if right else "?" for (q,) in encoded}
        return [[CompletionOutput(tokenizer.encode(text[q]), [], True)] * num_generations for (q,) in encoded]

    monkeypatch.setattr(completion_rows, "load_frozen", remembering)
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])
    monkeypatch.setattr(completions, "generate", generate)
    return artifacts, asked


def test_the_last_of_several_checkpoints_samples(tmp_path, prompts, rounds):
    artifacts, asked = rounds
    run(CONFIG, {"model": artifacts, "prompts": prompts}, Workspace(tmp_path))
    assert asked == ["dpo_2"]


def test_the_checkpoint_whose_dev_answers_are_worth_most_samples_where_asked(tmp_path, prompts, rounds):
    artifacts, asked = rounds
    config = CONFIG.model_copy(update={"policy": "best", "policy_prompts": 6})
    workspace = Workspace(tmp_path)
    metrics = run(config, {"model": artifacts, "prompts": prompts}, workspace)
    assert asked == ["dpo_0", "dpo_1", "dpo_2", "dpo_1"]
    assert metrics["pass_at_1"] == 1
    log = workspace.events.read_text()
    assert "policy dpo_1: reward 1.0000 +- 0.0000 on 6 prompts" in log
    assert "sampling from dpo_1" in log


def test_of_checkpoints_that_are_worth_the_same_the_last_samples(tmp_path, prompts, rounds):
    artifacts, asked = rounds
    config = CONFIG.model_copy(update={"policy": "best", "policy_prompts": 6})
    run(config, {"model": (artifacts[0], artifacts[2]), "prompts": prompts}, Workspace(tmp_path))
    assert asked == ["dpo_0", "dpo_2", "dpo_2"]


def test_a_run_killed_while_policies_are_compared_asks_none_of_them_again(tmp_path, prompts, rounds, monkeypatch):
    artifacts, asked = rounds
    config = CONFIG.model_copy(update={"policy": "best", "policy_prompts": 6})
    killed = Workspace(tmp_path)
    monkeypatch.setattr(killed, "log", lambda message: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config, {"model": artifacts, "prompts": prompts}, killed)
    run(config, {"model": artifacts, "prompts": prompts}, Workspace(tmp_path))
    assert asked == ["dpo_0", "dpo_1", "dpo_2", "dpo_1"]
