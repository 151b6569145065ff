import pytest
import torch

from lilpipe.alignment.rollouts import Answers
from lilpipe.alignment.shared_prompts import ANSWERS_IN_A_ROW, share_prompts
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from tests.alignment.conftest import TINY

VOCAB = 50
PROMPTS = ([1, 2, 3, 4, 5], [6, 7], [8])


def answers_of(lengths_by_prompt):
    """Random answers of these lengths to each prompt, as a rollout holds them, in a shuffled order."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        (prompt, torch.randint(VOCAB, (length,), generator=generator).tolist())
        for prompt, lengths in zip(PROMPTS, lengths_by_prompt, strict=False)
        for length in lengths
    ]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, drawn = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        drawn[row, len(prompt) : len(prompt) + len(answer)] = True
    targets = tokens[:, 1:].where(drawn[:, 1:], IGNORED)
    zeros = torch.zeros(targets.shape)
    return Answers(tokens[:, :-1], targets, drawn[:, 1:], zeros, zeros)


def model_of(**changes):
    model = Transformer(TINY.model_copy(update={"num_layers": 2, **changes}), VOCAB).double()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def alone(model, answers):
    return model(answers.inputs, targets_BT=answers.targets).logprobs


def shared(model, answers, max_len):
    rows = share_prompts(answers, max_len=max_len)
    scores = model(rows.inputs, targets_BT=rows.targets, positions_BT=rows.positions, mask=rows.mask)
    return scores.logprobs.flatten()[rows.places].where(answers.drawn, 0.0), rows


@pytest.mark.parametrize("changes", [{}, {"architecture": "gpt2", "num_kv_heads": 2}], ids=["llama", "gpt2"])
@pytest.mark.parametrize("max_len", [160, 12])
def test_scores_and_gradients_are_those_of_answers_alone(changes, max_len):
    model = model_of(**changes)
    answers = answers_of([[3, 9, 1, 4, 4, 6], [5, 2], [7]])
    weights = torch.randn(answers.targets.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = [], []
    for logprobs, into in ((shared(model, answers, max_len)[0], found), (alone(model, answers), wanted)):
        model.zero_grad()
        (logprobs * weights).sum().backward()
        into += [logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_row_holds_one_prompt_once_and_no_more_than_it_has_room_for():
    answers = answers_of([[3] * (2 * ANSWERS_IN_A_ROW + 1)])
    rows = share_prompts(answers, max_len=160)
    assert len(rows.inputs) == 3
    assert sum((row == 1).sum() for row in rows.inputs[:, :4]) == 3  # the prompt's first token
    room_for_two = len(PROMPTS[0]) - 1 + 2 * 3
    assert len(share_prompts(answers, max_len=room_for_two).inputs) == ANSWERS_IN_A_ROW + 1
    assert share_prompts(answers, max_len=room_for_two).inputs.shape[1] == room_for_two


def test_an_answer_that_saw_its_neighbour_would_be_found_out():
    model, answers = model_of(), answers_of([[3, 9, 1, 4]])
    rows = share_prompts(answers, max_len=160)
    scores = model(rows.inputs, targets_BT=rows.targets, positions_BT=rows.positions)  # plainly causal
    leaky = scores.logprobs.flatten()[rows.places].where(answers.drawn, 0.0)
    assert (leaky - alone(model, answers)).abs().max() > 1e-3
