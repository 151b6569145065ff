import pytest

from lilpipe.alignment import completions
from lilpipe.alignment.preferences import brevity_pairs, read_pairs, run
from lilpipe.alignment.prompts import read_prompts
from lilpipe.config import PreferencesConfig, SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import Sample
from lilpipe.stage import Workspace

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
