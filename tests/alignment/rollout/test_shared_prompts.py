import pytest
import torch

from lilpipe.alignment.rollout.completion_batch import CompletionBatch
from lilpipe.alignment.rollout.shared_prompts import ROW_LEN, PromptSharing, by_prompt, share_prompts, sharing_of
from lilpipe.model.scores import IGNORED
from lilpipe.model.transformer import Transformer
from tests.alignment.conftest import TINY
from tests.model.options import of_family

VOCAB = 50
NARROW = 10.0
"""Cost of attention with which the narrowest rows are best."""
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
    return CompletionBatch(tokens[:, :-1], targets, drawn[:, 1:], zeros, zeros)


def model_of(**changes):
    model = Transformer(TINY.model_copy(update={"num_layers": 2, **changes}), VOCAB).double()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def alone(model, answers):
    return model(answers.inputs, targets_BT=answers.targets).logprobs


def shared(model, answers, sharing):
    rows = share_prompts(answers, sharing)
    scores = model(rows.inputs, targets_BT=rows.targets, positions_BT=rows.positions, mask=rows.mask)
    return scores.logprobs.flatten()[rows.places].where(answers.completion_mask, 0.0), rows


@pytest.mark.parametrize("cost", [NARROW, 0.0])
@pytest.mark.parametrize("changes", [{}, {**of_family("gpt2"), "num_kv_heads": 2}], ids=["llama", "gpt2"])
@pytest.mark.parametrize("max_len", [160, 12])
def test_scores_and_gradients_are_those_of_answers_alone(changes, max_len, cost):
    model = model_of(**changes)
    answers = answers_of([[3, 9, 1, 4, 4, 6], [5, 2], [7]])
    weights = torch.randn(answers.targets.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = [], []
    for logprobs, into in (
        (shared(model, answers, PromptSharing(max_len, cost))[0], found),
        (alone(model, answers), wanted),
    ):
        model.zero_grad()
        (logprobs * weights).sum().backward()
        into += [logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_rows_hold_a_prompt_once_for_all_answers_that_they_have_room_for():
    shared_len, num_completions = len(PROMPTS[0]) - 1, 9
    answers = answers_of([[3] * num_completions])
    rows = share_prompts(answers, PromptSharing(160, NARROW))
    assert rows.inputs.shape == (1, shared_len + 3 * num_completions)
    assert (rows.inputs[:, :shared_len] == torch.tensor(PROMPTS[0][:-1])).all()
    room_for_two = shared_len + 2 * 3
    rows = share_prompts(answers, PromptSharing(room_for_two, NARROW))
    assert rows.inputs.shape == (5, room_for_two)
    assert (rows.inputs[:, :shared_len] == torch.tensor(PROMPTS[0][:-1])).all()


def test_rows_are_as_long_as_pays_off():
    answers = answers_of([[ROW_LEN] * 6])
    alone, whole = (share_prompts(answers, PromptSharing(2000, cost)) for cost in (NARROW, 0.0))
    assert alone.inputs.shape == (6, 4 + ROW_LEN)
    assert whole.inputs.shape == (1, 4 + 6 * ROW_LEN)


def test_long_prompts_share_more_in_a_wide_model():
    model = model_of()
    assert sharing_of(model.config).max_len == model.config.max_seq_len
    wide = model.config.model_copy(update={"hidden_size": 8 * model.config.hidden_size, "num_heads": 16})
    assert sharing_of(wide).attention_cost < sharing_of(model.config).attention_cost


def test_parts_hold_whole_groups():
    answers = answers_of([[3, 9, 4], [5, 2, 6], [7, 8, 1]])
    parts = by_prompt(answers, 3)
    assert sorted(torch.cat(parts).tolist()) == list(range(9))
    for part in parts:
        assert (
            len({tuple(answers.inputs[n][: int(answers.completion_mask[n].int().argmax()) + 1].tolist()) for n in part})
            == 1
        )


def test_another_prompt_takes_the_room_that_is_left():
    answers = answers_of([[3, 9, 1, 4, 4, 6], [5, 2], [7]])
    longest, second, third = 4 + 27, 1 + 7, 0 + 7
    assert share_prompts(answers, PromptSharing(160, NARROW)).inputs.shape == (1, longest + second + third)
    assert share_prompts(answers, PromptSharing(longest + third, NARROW)).inputs.shape == (2, longest + third)


def test_an_answer_longer_than_a_row_widens_it():
    answers = answers_of([[ROW_LEN + 8, ROW_LEN + 10]])
    assert share_prompts(answers, PromptSharing(160, NARROW)).inputs.shape == (2, 4 + ROW_LEN + 10)


def test_an_answer_that_saw_its_neighbour_would_be_found_out():
    model, answers = model_of(), answers_of([[3, 9, 1, 4]])
    rows = share_prompts(answers, PromptSharing(160, NARROW))
    scores = model(rows.inputs, targets_BT=rows.targets, positions_BT=rows.positions)  # plainly causal
    leaky = scores.logprobs.flatten()[rows.places].where(answers.completion_mask, 0.0)
    assert (leaky - alone(model, answers)).abs().max() > 1e-3
