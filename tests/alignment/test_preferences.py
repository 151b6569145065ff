import pytest

from lilpipe.alignment import completions
from lilpipe.alignment.pairs import PAIR_SCHEMA, Pair
from lilpipe.alignment.preferences import brevity_pairs, correctness_pairs, read_pairs, reward_pairs, run
from lilpipe.alignment.prompts import read_prompts
from lilpipe.alignment.tables import write_table
from lilpipe.config import PreferencesConfig, RewardConfig, SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import Sample
from lilpipe.stage import Workspace
from tests.alignment.conftest import as_artifact

CONFIG = PreferencesConfig(
    seed=0, num_prompts=10, num_heldout=5, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=8)
)


def row(words, *, correct=True, well_formed=True, ended=True, sample=0):
    return {
        "response": " ".join(["w"] * words + [f"{correct} {sample}"]),
        "num_words": words,
        "correct": correct and well_formed,
        "well_formed": well_formed,
        "ended": ended,
        "sample": sample,
    }


def words(pairs):
    return [(chosen["num_words"], rejected["num_words"]) for chosen, rejected in pairs]


def config(**settings):
    return PreferencesConfig(seed=0, **settings)


def test_the_shorter_of_two_correct_answers_is_chosen():
    assert words(brevity_pairs([row(5), row(2)], config(max_pairs_per_prompt=1, only_correct=True))) == [(2, 5)]


def test_the_widest_difference_comes_first_and_no_answer_is_used_twice():
    rows = [row(n, sample=n) for n in (4, 9, 2, 7, 3)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=True))) == [(2, 9), (3, 7)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=1, only_correct=True))) == [(2, 9)]


def test_the_first_sample_is_chosen_against_the_nearest_longer_one_where_asked():
    rows = [row(n, sample=i) for i, n in enumerate((9, 4, 2, 17, 3))]
    assert words(brevity_pairs(rows, config(contrast="nearest"))) == [(9, 17)]
    assert words(brevity_pairs(rows, config(contrast="nearest", min_words_apart=6))) == [(9, 17)]
    assert words(brevity_pairs(rows, config(contrast="nearest", min_words_apart=9))) == [(4, 17)]
    assert brevity_pairs(rows, config(contrast="nearest", min_words_apart=16)) == []
    assert brevity_pairs(rows, config(min_words_apart=16)) == []


@pytest.mark.parametrize(
    "rows",
    [
        [row(3, sample=1), row(3, sample=2)],
        [row(2), row(5, correct=False)],
        [row(2, well_formed=False), row(5)],
        [row(2, well_formed=False), row(5, correct=False)],
        [row(2, well_formed=False, ended=False), row(5, well_formed=False)],
        [row(2)],
        [],
    ],
    ids=["equal length", "other verdict", "malformed", "malformed and wrong", "cut off", "alone", "none"],
)
def test_answers_that_differ_in_more_or_less_than_length_are_no_pair(rows):
    assert brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=False)) == []


def test_answers_that_are_wrong_alike_are_paired_on_request_after_correct_ones():
    malformed = [row(1, well_formed=False), row(9, well_formed=False)]
    rows = [*malformed, row(2, correct=False), row(5, correct=False), row(3), row(4)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=True))) == [(3, 4)]
    assert words(brevity_pairs(rows, config(max_pairs_per_prompt=9, only_correct=False))) == [(3, 4), (2, 5), (1, 9)]
    assert words(brevity_pairs(rows[:4], config(max_pairs_per_prompt=1, only_correct=False))) == [(2, 5)]


def rewarded(*rewards, **settings):
    return [{**row(2, sample=index), "reward": reward, **settings} for index, reward in enumerate(rewards)]


def rewards_of(pairs):
    return [(chosen["reward"], rejected["reward"]) for chosen, rejected in pairs]


def test_the_best_answer_is_chosen_against_the_worst():
    rows = rewarded(0.5, -1.0, 2.0, 0.1)
    assert rewards_of(reward_pairs(rows, config(rule="reward"))) == [(2.0, -1.0)]
    assert rewards_of(reward_pairs(rows, config(rule="reward", max_pairs_per_prompt=9))) == [(2.0, -1.0), (0.5, 0.1)]
    assert rewards_of(reward_pairs(rewarded(1.0, 3.0, 2.0), config(max_pairs_per_prompt=9))) == [(3.0, 1.0)]


def test_answers_that_are_worth_nearly_the_same_are_no_pair():
    rows = rewarded(0.5, -1.0, 2.0, 0.1)
    assert rewards_of(reward_pairs(rows, config(min_margin=3.0))) == [(2.0, -1.0)]
    assert reward_pairs(rows, config(min_margin=3.01)) == []
    assert reward_pairs(rewarded(1.0, 1.0), config()) == []
    assert reward_pairs(rewarded(1.0), config()) == reward_pairs([], config()) == []


def test_answers_that_were_cut_off_or_are_empty_or_the_same_text_are_no_pair():
    assert reward_pairs(rewarded(2.0, 1.0, ended=False), config()) == []
    assert reward_pairs(rewarded(2.0, 1.0, response="same"), config()) == []
    assert reward_pairs([*rewarded(2.0), *rewarded(1.0, response="")], config()) == []


def test_a_right_answer_is_chosen_against_a_wrong_one_in_the_order_sampled():
    rows = [row(n, correct=n % 2 == 0, sample=n) for n in range(1, 6)]
    assert words(correctness_pairs(rows, config())) == [(2, 1)]
    assert words(correctness_pairs(rows, config(max_pairs_per_prompt=9))) == [(2, 1), (4, 3)]
    assert correctness_pairs(rows[:1], config()) == []
    assert correctness_pairs([row(1, correct=False, ended=False), row(2)], config()) == []


@pytest.fixture
def inputs(make_checkpoint, prompts):
    return {"model": make_checkpoint(), "prompts": prompts}


@pytest.fixture
def wordy(monkeypatch, prompts, tokenizer):
    """A sampler that is always right, in one word more each time."""
    everything = [prompt for split in ("train", "dev") for prompt in read_prompts(prompts.path, split)]
    answers = {prompt.question: prompt.answer for prompt in everything}
    monkeypatch.setattr(completions, "encode_question", lambda _, question, form: [question])

    def generate(model, encoded, *, num_samples, **options):
        return [
            [Sample(tokenizer.encode("so " * k + f"Answer: {answers[q]}"), [], True) for k in range(num_samples)]
            for (q,) in encoded
        ]

    monkeypatch.setattr(completions, "generate", generate)


def test_pairs_come_from_the_end_of_train_and_held_out_ones_from_dev(tmp_path, inputs, wordy):
    metrics = run(CONFIG, inputs, Workspace(tmp_path))
    train, heldout = read_pairs(tmp_path / "output", "train"), read_pairs(tmp_path / "output", "heldout")
    assert metrics["prompts_with_pair_share"] == metrics["heldout_prompts_with_pair_share"] == 1
    source = inputs["prompts"].path
    assert [pair.prompt_id for pair in train] == [p.id for p in read_prompts(source, "train")[::-1][:10]]
    assert [pair.prompt_id for pair in heldout] == [p.id for p in read_prompts(source, "dev")[:5]]
    for pair in [*train, *heldout]:
        assert pair.rejected == "so so so " + pair.chosen
        assert pair.prompt[0]["role"] == "user"


def test_a_model_that_gives_no_pair_stops_the_stage_with_remedies(tmp_path, inputs):
    with pytest.raises(DataError, match=r"none of 10 prompts gave two answers.*samples_per_prompt"):
        run(CONFIG, inputs, Workspace(tmp_path))


def test_more_prompts_than_there_are_is_refused_with_numbers(tmp_path, inputs):
    with pytest.raises(ConfigError, match="num_heldout: got 99, the dev split holds 20"):
        run(CONFIG.model_copy(update={"num_heldout": 99}), inputs, Workspace(tmp_path))


def test_pairs_by_reward_prefer_what_the_rewards_say(tmp_path, inputs, wordy):
    rewards = (RewardConfig(kind="regex", pattern="^so so so"),)
    metrics = run(CONFIG.model_copy(update={"rule": "reward", "rewards": rewards}), inputs, Workspace(tmp_path))
    assert metrics["reward/regex"] == 0.25
    for pair in read_pairs(tmp_path / "output", "train"):
        assert pair.chosen.startswith("so so so")
        assert not pair.rejected.startswith("so so so")


def test_a_model_that_is_always_right_gives_no_pair_by_correctness(tmp_path, inputs, wordy):
    with pytest.raises(DataError, match="none of 10 prompts gave two answers with different verdicts"):
        run(CONFIG.model_copy(update={"rule": "correctness"}), inputs, Workspace(tmp_path))


def test_a_rule_that_samples_needs_a_model(tmp_path, prompts):
    with pytest.raises(ConfigError, match="'brevity' samples answers, but the step has no model"):
        run(CONFIG, {"prompts": prompts}, Workspace(tmp_path))


# --- pairs that people made ---------------------------------------------------------------------------------------

DATA = CONFIG.model_copy(update={"rule": "data"})


def given(index, split="train", **answers) -> Pair:
    values = {"chosen": f"Good {index}", "rejected": f"Bad {index}", **answers}
    return Pair(f"{split}/{index}", split, [{"role": "user", "content": f"Say {index}."}], **values)


@pytest.fixture
def preference_set(tmp_path, prompts):
    def make(*pairs):
        directory = tmp_path / "set"
        directory.mkdir()
        (directory / "prompts.arrow").write_bytes((prompts.path / "prompts.arrow").read_bytes())
        write_table(directory / "pairs.arrow", [vars(pair) for pair in pairs], PAIR_SCHEMA)
        return {"prompts": as_artifact(directory, kind="Prompts")}

    return make


def test_pairs_of_a_preference_set_pass_with_their_edits(tmp_path, preference_set):
    pairs = [given(1), given(2, edited="Better 2"), given(3, "heldout")]
    metrics = run(DATA, preference_set(*pairs), Workspace(tmp_path))
    assert read_pairs(tmp_path / "output", "train") == pairs[:2]
    assert read_pairs(tmp_path / "output", "heldout") == pairs[2:]
    assert read_pairs(tmp_path / "output", "train")[1].ranking == ["Better 2", "Good 2", "Bad 2"]
    assert (metrics["pairs"], metrics["heldout_pairs"], metrics["edited_share"]) == (2, 1, 0.5)


def test_prompts_without_pairs_are_refused(tmp_path, prompts):
    with pytest.raises(DataError, match=r"'data' reads pairs.arrow"):
        run(DATA, {"prompts": prompts}, Workspace(tmp_path))


def test_an_answer_preferred_to_itself_is_refused(tmp_path, preference_set):
    with pytest.raises(DataError, match="1 of 2 pairs hold the same answer twice"):
        run(DATA, preference_set(given(1), given(2, rejected="Good 2")), Workspace(tmp_path))


def test_held_out_questions_in_the_pairs_are_refused(tmp_path, preference_set, prompts):
    question = read_prompts(prompts.path, "test")[0].question
    planted = Pair("x", "train", [{"role": "user", "content": question}], "a", "b")
    with pytest.raises(DataError, match="1 training questions occur in the dev or test split"):
        run(DATA, preference_set(given(1), planted), Workspace(tmp_path))
