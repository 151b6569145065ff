import pytest
import torch

from lilpipe.alignment.rewards.reward_functions import Scored, judge
from lilpipe.alignment.rollout.completions import Completion
from lilpipe.alignment.rollout.rollouts import (
    CompletionBatch,
    Group,
    Rollout,
    Rollouts,
    as_completion_batch,
    at_targets,
    by_length,
    completion_logprobs,
    group_metrics,
    means,
    micro_batches,
    read_rollout,
    write_rollout,
)
from lilpipe.config.model import ModelConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.generation.engine import CompletionOutput
from lilpipe.model.scores import IGNORED, token_scores
from lilpipe.model.transformer import Transformer, token_logprobs
from lilpipe.schemas.examples import Prompt

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")
CPU = torch.device("cpu")
CONFIG = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)


def completion(prompt_ids, drawn, text="Answer: 1 3", *, ended=True):
    logprobs = [-0.5 * (place + 1) for place in range(len(drawn) + 2)]  # the sampler may go on past the answer
    sample = CompletionOutput(drawn, logprobs, finished=False)
    return Completion(PROMPT, prompt_ids, sample, drawn, text, judge(PROMPT, text, ended=ended))


def group(*completions, rewards):
    return Group(list(completions), [Scored(reward, {"answer": reward}) for reward in rewards])


@pytest.fixture
def groups():
    return [
        group(completion([1, 2], [3, 4]), completion([1, 2], [5]), rewards=[1.0, 0.0]),
        group(completion([6], [7, 8, 9], ended=False), completion([6], [10]), rewards=[0.5, 0.5]),
    ]


def some_answers(num_rows=6, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (num_rows, width + 1), generator=generator)
    lengths = torch.randperm(width - 2, generator=generator)[:num_rows] + 3
    drawn = (torch.arange(width) >= 1) & (torch.arange(width) < lengths[:, None])
    targets = tokens[:, 1:].where(drawn, IGNORED)
    old = torch.randn(num_rows, width, generator=generator).where(drawn, 0.0)
    return CompletionBatch(tokens[:, :-1], targets, drawn, old, old + 1)


@pytest.fixture
def model():
    model = Transformer(CONFIG, 32)
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data.mul_(8) if parameter.dim() > 1 else None
    return model


def test_answers_are_targets_and_log_probabilities_where_the_policy_drew(tokenizer, groups):
    answers = as_completion_batch(groups, tokenizer, mask_truncated_completions=False, device=CPU)
    nothing, padding = IGNORED, tokenizer.padding_id
    assert answers.inputs.tolist() == [[1, 2, 3], [1, 2, 5], [6, 7, 8], [6, 10, padding]]
    assert answers.targets.tolist() == [[nothing, 3, 4], [nothing, 5, nothing], [7, 8, 9], [10, nothing, nothing]]
    assert answers.old_logprobs.tolist() == [[0, -0.5, -1], [0, -0.5, 0], [-0.5, -1, -1.5], [-0.5, 0, 0]]
    assert answers.lengths.tolist() == [3, 2, 3, 1]
    assert torch.equal(answers.counts, answers.completion_mask)


def test_answers_that_are_too_long_can_be_left_out_of_the_loss(tokenizer, groups):
    answers = as_completion_batch(groups, tokenizer, mask_truncated_completions=True, device=CPU)
    assert answers.counts.any(dim=1).tolist() == [True, True, False, True]
    assert answers.completion_mask.any(dim=1).all()


def test_what_a_rollout_was_like_is_summed_over_workers(groups):
    metrics = group_metrics(groups, num_replaced=1)
    assert metrics["reward"] == (2.0, 4.0)
    assert metrics["reward/answer"] == (2.0, 4.0)
    assert metrics["frac_reward_zero_std"] == (1.0, 2.0)
    assert metrics["length"] == (7.0, 4.0)
    assert metrics["truncated"] == (1.0, 4.0)
    assert metrics["entropy"] == (0.5 + 1 + 0.5 + 0.5 + 1 + 1.5 + 0.5, 7.0)
    assert means(metrics, lambda sums: [3 * value for value in sums])["reward"] == 0.5


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_goes_through_every_answer_once_and_short_ones_are_not_padded_much(minibatches, epoch):
    answers = some_answers()
    config = GRPOConfig(seed=0, num_mini_batches=minibatches, accumulation_steps=2, prompts_per_step=3)
    updates = [micro_batches(answers, epoch * minibatches + part, config, seed=1) for part in range(minibatches)]
    assert all(len(parts) == 2 for parts in updates)
    parts = [part for update in updates for part in update]
    assert sum(part.old_logprobs.sum().item() for part in parts) == pytest.approx(answers.old_logprobs.sum().item())
    assert sum(len(part.inputs) for part in parts) == 6
    assert all(part.inputs.shape[1] == part.lengths.max() for part in parts)
    for shorter, longer in updates:
        assert shorter.lengths.max() <= longer.lengths.min()


def test_each_epoch_has_an_order_of_its_own():
    answers = some_answers()
    config = GRPOConfig(seed=0, num_mini_batches=3, prompts_per_step=3)
    first, second, again = (micro_batches(answers, update, config, seed=1)[0] for update in (0, 3, 0))
    assert not torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.inputs, again.inputs)


def test_scores_of_targets_alone_are_those_of_all_with_their_gradients(model):
    answers = some_answers()
    weights = torch.randn(answers.targets.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for scores in (token_scores, at_targets(token_scores)):
        model.zero_grad()
        model.token_scores = scores
        found = model(answers.inputs, targets_BT=answers.targets)
        (found.logprobs * weights + 0.1 * found.normaliser).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert found.logprobs[~answers.completion_mask].eq(0).all()
    for whole, alone in zip(*gradients, strict=True):
        assert torch.allclose(whole, alone, atol=1e-5)


def test_scores_of_no_target_at_all_are_zeros_with_a_gradient(model):
    model.token_scores = at_targets(token_scores)
    found = model(torch.ones(2, 3, dtype=torch.int64), targets_BT=torch.full((2, 3), IGNORED)).logprobs
    found.sum().backward()
    assert found.eq(0).all()
    assert model.output_weight.grad.eq(0).all()


def test_log_probabilities_in_parts_are_those_of_the_whole(model):
    answers = some_answers()
    tokens = torch.cat([answers.inputs, answers.targets[:, -1:].clamp(min=0)], dim=1)
    expected = token_logprobs(model, tokens).where(answers.completion_mask, 0.0)
    for parts in (1, 4):
        assert torch.allclose(completion_logprobs(model, answers, parts=parts), expected, atol=1e-5)
    hot = model(answers.inputs).div(1.7).log_softmax(-1).gather(-1, answers.targets.clamp(min=0)[..., None])[..., 0]
    got = completion_logprobs(model, answers, parts=2, temperature=1.7)
    assert torch.allclose(got, hot.where(answers.completion_mask, 0.0), atol=1e-5)


def test_another_temperature_is_refused_for_logits_that_are_capped():
    targets = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"sampling.temperature: got 0.5, expected 1 for a model with logit_softcap"):
        at_targets(token_scores, 0.5)(torch.zeros(1, 2, 4), torch.zeros(8, 4), targets, softcap=30.0)


def rollouts(directory, *, drawn, data_rank=0):
    def make(number):
        drawn.append(number)
        return Rollout(some_answers(seed=number), {"reward": (float(number), 1.0)})

    return Rollouts(make, directory, updates=2, data_rank=data_rank, num_data_ranks=2, device=CPU)


def test_a_rollout_is_drawn_once_and_kept_for_its_updates(tmp_path):
    drawn = []
    source = rollouts(tmp_path, drawn=drawn)
    got = [source.at(step) for step in range(6)]
    assert [(number, update) for _, number, update in got] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert drawn == [0, 1, 2]
    assert got[2][0] is got[3][0]
    assert len(list(tmp_path.iterdir())) == 2  # the last two

    again = rollouts(tmp_path, drawn=drawn).at(5)[0]
    assert drawn == [0, 1, 2]
    assert again.metrics == {"reward": (2.0, 1.0)}
    for kept, expected in zip(again.completions, got[5][0].completions, strict=True):
        assert kept is expected or torch.equal(torch.as_tensor(kept), torch.as_tensor(expected))


def test_the_answers_of_another_worker_are_not_taken_for_ones_own(tmp_path):
    rollouts(tmp_path, drawn=[]).at(0)
    with pytest.raises(ArtifactError, match=r"rollout-000000.1-of-2.safetensors: does not exist"):
        rollouts(tmp_path, drawn=[], data_rank=1).at(1)


def test_a_rollout_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rollout.safetensors"
    write_rollout(path, Rollout(some_answers(seed=1)))
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_rollout(path, Rollout(some_answers(seed=2)))
    assert path.read_bytes() == before
    assert read_rollout(path, CPU).metrics == {}


def test_rows_are_cut_into_parts_by_length():
    answers = some_answers()
    parts = by_length(answers, 3)
    assert sorted(torch.cat(parts).tolist()) == list(range(6))
    assert answers.lengths[torch.cat(parts)].diff().ge(0).all()
