import pytest
import torch

from lilpipe.alignment import completions
from lilpipe.alignment.completions import complete, encode_question, pad_completions
from lilpipe.alignment.prompts import Prompt, as_text
from lilpipe.config import SamplingConfig
from lilpipe.generation.engine import Sample
from lilpipe.model.hub import load_model

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
    sample = Sample(tokenizer.encode(text), [], finished)
    monkeypatch.setattr(completions, "generate", lambda *args, **options: [[sample]])
    model, _ = load_model(make_checkpoint().path)
    verdict = complete(model, tokenizer, [PROMPT], form=form, sampling=SamplingConfig(), seed=0)[0][0].verdict
    assert (verdict.ended, verdict.correct) == (ended, correct)
    assert verdict.well_formed == correct


def test_the_same_seed_draws_the_same_answers_and_another_others(tokenizer, make_checkpoint):
    model, _ = load_model(make_checkpoint().path)
    sampling = SamplingConfig(max_new_tokens=8)

    def draw(seed):
        groups = complete(model, tokenizer, [PROMPT], form="chat", sampling=sampling, seed=seed, num_samples=3)
        return [completion.sample.tokens for completion in groups[0]]

    assert draw(1) == draw(1) != draw(2)
    assert len({tuple(tokens) for tokens in draw(1)}) == 3
    assert torch.is_grad_enabled()
