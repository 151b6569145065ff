import pytest

from lilpipe.alignment.preference import dpo
from lilpipe.alignment.preference.preferences import judged_examples, run
from lilpipe.alignment.rollout import completions
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import CompletionOutput
from lilpipe.schemas.examples import Prompt, read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import EXAMPLE_SCHEMA, PAIR_SCHEMA, Pair, UnpairedExample, read_examples, read_pairs
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from tests.alignment.conftest import as_artifact
from tests.alignment.preference.test_pairing_rules import row

CONFIG = PreferencesConfig(
    seed=0, num_prompts=10, num_validation=5, num_generations=4, sampling=SamplingConfig(max_new_tokens=8)
)


@pytest.fixture
def inputs(make_checkpoint, prompts):
    return {"model": make_checkpoint(), "prompts": prompts}


@pytest.fixture
def wordy(monkeypatch, prompts, tokenizer):
    """A sampler that is always right, in one word more each time."""
    everything = [prompt for split in ("train", "validation") for prompt in read_prompts(prompts.path, split)]
    answers = {prompt.question: prompt.answer for prompt in everything}
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_generations, **options):
        return [
            [
                CompletionOutput(tokenizer.encode("so " * k + f"Answer: {answers[q]}"), [], True)
                for k in range(num_generations)
            ]
            for (q,) in encoded
        ]

    monkeypatch.setattr(completions, "generate", generate)


def test_pairs_come_from_the_end_of_train_and_held_out_ones_from_dev(tmp_path, inputs, wordy):
    metrics = run(CONFIG, inputs, Workspace(tmp_path))
    train, validation = read_pairs(tmp_path / "output", "train"), read_pairs(tmp_path / "output", "validation")
    assert metrics["prompts_with_pair_ratio"] == metrics["validation_prompts_with_pair_ratio"] == 1
    source = inputs["prompts"].path
    assert [pair.prompt_id for pair in train] == [p.id for p in read_prompts(source, "train")[::-1][:10]]
    assert [pair.prompt_id for pair in validation] == [p.id for p in read_prompts(source, "validation")[:5]]
    for pair in [*train, *validation]:
        assert pair.rejected == "so so so " + pair.chosen
        assert pair.prompt[0]["role"] == "user"


def test_a_model_that_gives_no_pair_stops_the_stage_with_remedies(tmp_path, inputs):
    with pytest.raises(DataError, match=r"none of 10 prompts gave two completions.*num_generations"):
        run(CONFIG, inputs, Workspace(tmp_path))


def test_more_prompts_than_there_are_is_refused_with_numbers(tmp_path, inputs):
    with pytest.raises(ConfigError, match="num_validation: got 99, but the validation split has 20"):
        run(CONFIG.model_copy(update={"num_validation": 99}), inputs, Workspace(tmp_path))


def test_pairs_by_reward_prefer_what_the_rewards_say(tmp_path, inputs, wordy):
    rewards = (RewardConfig(kind="regex", pattern="^so so so"),)
    metrics = run(CONFIG.model_copy(update={"rule": "reward", "rewards": rewards}), inputs, Workspace(tmp_path))
    assert metrics["reward/regex"] == 0.25
    for pair in read_pairs(tmp_path / "output", "train"):
        assert pair.chosen.startswith("so so so")
        assert not pair.rejected.startswith("so so so")


def test_a_model_that_is_always_right_gives_no_pair_by_correctness(tmp_path, inputs, wordy):
    with pytest.raises(DataError, match="none of 10 prompts gave two completions with different verdicts"):
        run(CONFIG.model_copy(update={"rule": "correctness"}), inputs, Workspace(tmp_path))


def test_a_rule_that_samples_needs_a_model(tmp_path, prompts):
    with pytest.raises(ConfigError, match="'brevity' samples completions, but the step has no model"):
        run(CONFIG, {"prompts": prompts}, Workspace(tmp_path))


# --- pairs that people made ---------------------------------------------------------------------------------------

DATA = CONFIG.model_copy(update={"rule": "data"})


def given(index, split="train", **completions) -> Pair:
    values = {"chosen": f"Good {index}", "rejected": f"Bad {index}", **completions}
    return Pair(f"{split}/{index}", split, [{"role": "user", "content": f"Say {index}."}], **values)


@pytest.fixture
def preference_set(tmp_path, prompts):
    def make(*pairs):
        directory = tmp_path / "set"
        directory.mkdir()
        (directory / "prompts.arrow").write_bytes((prompts.path / "prompts.arrow").read_bytes())
        write_rows(directory / "pairs.arrow", [vars(pair) for pair in pairs], PAIR_SCHEMA)
        return {"prompts": as_artifact(directory, kind="Prompts")}

    return make


def test_pairs_of_a_preference_set_pass_with_their_edits(tmp_path, preference_set):
    pairs = [given(1), given(2, edited="Better 2"), given(3, "validation")]
    metrics = run(DATA, preference_set(*pairs), Workspace(tmp_path))
    assert read_pairs(tmp_path / "output", "train") == pairs[:2]
    assert read_pairs(tmp_path / "output", "validation") == pairs[2:]
    assert read_pairs(tmp_path / "output", "train")[1].ranking == ["Better 2", "Good 2", "Bad 2"]
    assert (metrics["pairs"], metrics["validation_pairs"], metrics["edited_ratio"]) == (2, 1, 0.5)


def test_prompts_without_pairs_are_refused(tmp_path, prompts):
    with pytest.raises(DataError, match=r"'data' reads pairs.arrow"):
        run(DATA, {"prompts": prompts}, Workspace(tmp_path))


def test_a_completion_preferred_to_itself_is_refused(tmp_path, preference_set):
    with pytest.raises(DataError, match="1 of 2 pairs have identical completions"):
        run(DATA, preference_set(given(1), given(2, rejected="Good 2")), Workspace(tmp_path))


def test_held_out_questions_in_the_pairs_are_refused(tmp_path, preference_set, prompts):
    question = read_prompts(prompts.path, "test")[0].question
    planted = Pair("x", "train", [{"role": "user", "content": question}], "a", "b")
    with pytest.raises(DataError, match="1 training questions occur in the validation or test split"):
        run(DATA, preference_set(given(1), planted), Workspace(tmp_path))


# --- unpaired completions
# -----------------------------------------------------------------------------------------------


def unpaired(**settings):
    return PreferencesConfig(**CONFIG.model_dump() | {"unpaired": True, "rule": "correctness"} | settings)


@pytest.fixture
def half_right(monkeypatch, prompts, tokenizer):
    """A sampler of four completions: right, right again in the same words, wrong, and cut off."""
    everything = [prompt for split in ("train", "validation") for prompt in read_prompts(prompts.path, split)]
    answers = {prompt.question: prompt.answer for prompt in everything}
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_generations, **options):
        texts = ("Answer: {}", "Answer:  {}", "Sure. Answer: {} 0", "Answer: {}, which")
        return [
            [
                CompletionOutput(tokenizer.encode(text.format(answers[q])), [], text != texts[-1])
                for text in texts[:num_generations]
            ]
            for (q,) in encoded
        ]

    monkeypatch.setattr(completions, "generate", generate)


def test_each_completion_that_ended_is_an_example_right_or_wrong(tmp_path, inputs, half_right):
    metrics = run(unpaired(), inputs, Workspace(tmp_path))
    train, validation = read_examples(tmp_path / "output", "train"), read_examples(tmp_path / "output", "validation")
    assert (metrics["unpaired_examples"], metrics["validation_unpaired_examples"], metrics["desirable_ratio"]) == (
        20,
        10,
        0.5,
    )
    assert not (tmp_path / "output" / "pairs.arrow").exists()
    source = inputs["prompts"].path
    assert [item.prompt_id for item in train[::2]] == [p.id for p in read_prompts(source, "train")[::-1][:10]]
    assert [item.prompt_id for item in validation[::2]] == [p.id for p in read_prompts(source, "validation")[:5]]
    assert [item.completion.startswith("Answer:") for item in train] == [item.label for item in train]


def test_a_threshold_divides_completions_by_their_reward(tmp_path, inputs, half_right):
    rewards = (RewardConfig(kind="regex", pattern="^Sure", weight=0.5),)
    config = unpaired(rule="reward", threshold=0.5, rewards=rewards)
    metrics = run(config, inputs, Workspace(tmp_path))
    assert metrics["reward/regex"] == 0.25
    assert all(e.completion.startswith("Sure") == e.label for e in read_examples(tmp_path / "output", "train"))
    with pytest.raises(DataError, match=r"0 of 20 completions are desirable, expected some of .*preferences.threshold"):
        run(unpaired(rule="reward", threshold=0.6, rewards=rewards), inputs, Workspace(tmp_path / "higher"))


def test_completions_that_no_verifier_can_judge_are_no_bad_examples():
    rows = [row(n, correct=n == 1, sample=n) | {"reward": 1.0} for n in range(1, 3)]
    asked = [Prompt("a", "f", "A?", "1"), Prompt("b", "f", "B?", "", verifier="none")]
    groups = [rows, rows]
    by_verifier = judged_examples(groups, asked, unpaired(), split="train")
    assert [(item.prompt_id, item.label) for item in by_verifier] == [("a", True), ("a", False)]
    by_reward = judged_examples(groups, asked, unpaired(rule="reward", threshold=1.0), split="train")
    assert [(item.prompt_id, item.label) for item in by_reward] == [("a", True)] * 2 + [("b", True)] * 2


def test_kto_learns_from_sampled_completions_without_pairs_which_other_losses_refuse(
    tmp_path, inputs, half_right, monkeypatch
):
    monkeypatch.setattr(dpo, "write_report", lambda *args, **options: None)  # drawing takes longer than training here
    run(unpaired(), inputs, Workspace(tmp_path / "preferences"))
    preferences = as_artifact(tmp_path / "preferences" / "output", kind="Preferences")
    settings = DPOConfig(
        seed=0,
        loss_type="kto",
        num_epochs=2,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    )
    metrics = dpo.run(settings, inputs | {"preferences": preferences}, Workspace(tmp_path / "dpo"))
    assert (metrics["completions"], metrics["validation_completions"], metrics["steps"]) == (20, 10, 10)
    assert metrics["validation_margin_before"] == 0
    assert metrics["validation_margin"] > 0.5
    assert metrics["validation_preference_accuracy"] > 0.9
    sigmoid = settings.model_copy(update={"loss_type": "sigmoid"})
    with pytest.raises(
        DataError, match=r"unpaired completions \(examples.arrow\), expected pairs; only dpo.loss_type = 'kto'"
    ):
        dpo.run(sigmoid, inputs | {"preferences": preferences}, Workspace(tmp_path / "sigmoid"))


def test_unpaired_completions_that_people_judged_pass_as_they_are(tmp_path, preference_set):
    def judged(index, desirable, split="train"):
        asked: list[Message] = [{"role": "user", "content": f"Say {index}."}]
        return UnpairedExample(f"{split}/{index}", split, asked, f"{desirable} {index}", desirable)

    examples = [judged(1, True), judged(2, False), judged(1, False), judged(3, True, "validation")]
    inputs = preference_set()
    write_rows(inputs["prompts"].path / "examples.arrow", [vars(item) for item in examples], EXAMPLE_SCHEMA)
    metrics = run(unpaired(rule="data"), inputs, Workspace(tmp_path))
    assert read_examples(tmp_path / "output", "train") == examples[:3]
    assert read_examples(tmp_path / "output", "validation") == examples[3:]
    assert (metrics["unpaired_examples"], metrics["prompts_with_completion"]) == (3, 2)
    with pytest.raises(DataError, match=r"has no pairs in the train split.*preferences\.unpaired"):
        run(DATA, inputs, Workspace(tmp_path / "pairs"))


def test_held_out_questions_among_unpaired_completions_are_refused(tmp_path, preference_set, prompts):
    question = read_prompts(prompts.path, "test")[0].question
    planted = [
        UnpairedExample("x", "train", [{"role": "user", "content": text}], "a", good)
        for text, good in ((question, True), ("New?", False))
    ]
    inputs = preference_set()
    write_rows(inputs["prompts"].path / "examples.arrow", [vars(item) for item in planted], EXAMPLE_SCHEMA)
    with pytest.raises(DataError, match="1 training questions occur in the validation or test split"):
        run(unpaired(rule="data"), inputs, Workspace(tmp_path))


def test_a_preference_set_without_unpaired_completions_is_refused(tmp_path, preference_set):
    with pytest.raises(DataError, match=r"rule 'data' reads examples.arrow .*rows have a `label`"):
        run(unpaired(rule="data"), preference_set(given(1)), Workspace(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unpaired": True}, "'brevity' compares two completions"),
        ({"unpaired": True, "rule": "reward"}, "threshold: got None with rule 'reward' and unpaired True"),
        ({"rule": "reward", "threshold": 1.0}, "threshold: got 1.0 with rule 'reward' and unpaired False"),
        ({"unpaired": True, "rule": "data", "threshold": 1.0}, "threshold: got 1.0 with rule 'data'"),
    ],
)
def test_verdicts_that_cannot_be_made_of_unpaired_completions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferencesConfig(seed=0, **settings)
