import pytest
import torch

from lilpipe.alignment.rollout import completions
from lilpipe.alignment.rollout.completions import complete, encode_question, pad_completions, up_to_stop
from lilpipe.alignment.verify.verifiers import as_text
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import DataError
from lilpipe.generation.engine import CompletionOutput
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import token_logprobs
from lilpipe.schemas.examples import Prompt

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")


def test_completions_are_padded_on_the_right_and_masked_to_what_was_answered():
    tokens, mask = pad_completions([[1, 2], [3]], [[4], [5, 6, 7]], padding_id=0)
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert mask.tolist() == [[False, True, False], [True, True, True]]
    targets = tokens[:, 1:]
    assert targets[0][mask[0]].tolist() == [4]
    assert targets[1][mask[1]].tolist() == [5, 6, 7]


def test_a_base_model_meets_the_text_of_its_pretraining_and_a_chat_model_a_turn(tokenizer):
    assert tokenizer.decode(encode_question(tokenizer, "Why?", "text")) == as_text("Why?")
    ids = encode_question(tokenizer, "Why?", "chat")
    assert ids == [tokenizer.user_id, *tokenizer.encode("Why?"), tokenizer.turn_end_id, tokenizer.assistant_id]


def test_a_text_question_is_a_prefix_of_its_exercise_in_tokens(tokenizer):
    document = tokenizer.encode(as_text("Why?") + " Answer: 1")
    question = encode_question(tokenizer, "Why?", "text")
    assert document[: len(question)] == question


@pytest.mark.parametrize(
    ("form", "text", "finished", "ended", "correct"),
    [
        ("text", " Answer: 1 3", True, True, True),
        ("text", " Answer: 1 3\n\nExercise: Copy", False, True, True),
        ("text", " Answer: 1 3", False, False, False),
        ("chat", "Answer: 1 3", True, True, True),
        ("chat", "Answer: 1 3", False, False, False),
        ("chat", "Answer: 1 3\n\nThank you.", True, True, False),
    ],
)
def test_an_answer_counts_only_once_it_has_ended(
    tokenizer, make_checkpoint, monkeypatch, form, text, finished, ended, correct
):
    sample = CompletionOutput(tokenizer.encode(text), [], finished)
    monkeypatch.setattr(completions, "generate", lambda *args, **options: [[sample]])
    model, _ = load_model(make_checkpoint().path)
    verdict = complete(model, tokenizer, [PROMPT], form=form, sampling=SamplingConfig(), seed=0)[0][0].verdict
    assert (verdict.ended, verdict.correct) == (ended, correct)
    assert verdict.well_formed == correct


@pytest.mark.parametrize(
    ("text", "cut", "kept"),
    [
        ("Answer: 1 3 User: More", "Answer: 1 3 ", "Answer: 1 3 User:"),
        ("<answer>4</answer> User: More", "<answer>4", "<answer>4</answer>"),
        ("Answer: 1 3 Use", "Answer: 1 3 Use", "Answer: 1 3 Use"),
    ],
)
def test_a_text_ends_before_the_first_stop_string_or_with_it(text, cut, kept):
    stop = ("User:", "</answer>")
    assert (up_to_stop(text, stop, keep=False), up_to_stop(text, stop, keep=True)) == (cut, kept)


@pytest.mark.parametrize("form", ["chat", "text"])
def test_what_begins_with_a_stop_string_is_not_judged(tokenizer, make_checkpoint, monkeypatch, form):
    sample = CompletionOutput(tokenizer.encode("Answer: 1 3 User:"), [], finished=True, stop_reason="stop_string")
    monkeypatch.setattr(completions, "generate", lambda *args, **options: [[sample]])
    model, _ = load_model(make_checkpoint().path)

    def answer(**settings):
        sampling = SamplingConfig(stop=("User:",), **settings)
        return complete(model, tokenizer, [PROMPT], form=form, sampling=sampling, seed=0)[0][0]

    assert (answer().text, answer().verdict.correct) == ("Answer: 1 3", True)
    assert (answer(keep_stop=True).text, answer(keep_stop=True).verdict.correct) == ("Answer: 1 3 User:", False)
    assert answer().completion_ids == answer(keep_stop=True).completion_ids == sample.tokens


@pytest.mark.parametrize("form", ["chat", "text"])
def test_an_answer_that_a_stop_string_of_several_tokens_ends_is_learnt_as_it_was_drawn(
    tokenizer, make_checkpoint, form
):
    model, _ = load_model(make_checkpoint().path)

    def draw(*stop):
        sampling = SamplingConfig(max_new_tokens=24, stop=stop)
        return complete(model, tokenizer, [PROMPT], form=form, sampling=sampling, seed=3, num_generations=8)[0]

    def is_ascii(tokens):
        return max(tokens) < 128

    at_length = [one for one in draw() if one.sample.stop_reason == "length"]
    plain, place = next((one, k) for one in at_length for k in range(4, 20) if is_ascii(one.completion_ids[k : k + 2]))
    stop = tokenizer.decode(plain.completion_ids[place : place + 2])
    (ended,) = [one for one in draw(stop) if stop in tokenizer.decode(one.completion_ids)]
    assert ended.sample.stop_reason == "stop_string"
    text = tokenizer.decode(plain.completion_ids)
    assert ended.verdict.ended
    assert ended.text == text[: text.index(stop)].strip()
    assert ended.completion_ids == plain.completion_ids[: len(ended.completion_ids)]
    assert tokenizer.decode(ended.completion_ids).endswith(stop)
    assert tokenizer.turn_end_id not in ended.completion_ids
    assert ended.as_completion_text.num_tokens == len(ended.completion_ids) == len(ended.sample.logprobs)
    tokens, mask = pad_completions([ended.prompt_ids], [ended.completion_ids], padding_id=0)
    trained = token_logprobs(model, tokens)[mask]
    assert trained.tolist() == pytest.approx(ended.sample.logprobs, abs=1e-5)


def test_nothing_to_keep_is_refused():
    with pytest.raises(ValueError, match="keep_stop is true, but stop is empty"):
        SamplingConfig(keep_stop=True)


def test_the_same_seed_draws_the_same_answers_and_another_others(tokenizer, make_checkpoint):
    model, _ = load_model(make_checkpoint().path)
    sampling = SamplingConfig(max_new_tokens=8)

    def draw(seed):
        groups = complete(model, tokenizer, [PROMPT], form="chat", sampling=sampling, seed=seed, num_generations=3)
        return [completion.sample.tokens for completion in groups[0]]

    assert draw(1) == draw(1) != draw(2)
    assert len({tuple(tokens) for tokens in draw(1)}) == 3
    assert torch.is_grad_enabled()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(tokenizer, make_checkpoint):
    model, _ = load_model(make_checkpoint().path)
    long = Prompt("train/gsm8k/000007", "gsm8k", "How much? " * 200, "1")
    with pytest.raises(DataError, match=r"prompt 'train/gsm8k/000007': got \d+ tokens, expected at most \d+.*'How"):
        complete(model, tokenizer, [PROMPT, long], form="chat", sampling=SamplingConfig(), seed=0)
