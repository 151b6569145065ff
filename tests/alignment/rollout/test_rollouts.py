import pytest
import torch

from lilpipe.alignment.rewards.reward_functions import Scored, judge
from lilpipe.alignment.rollout.completions import Completion
from lilpipe.alignment.rollout.rollouts import (
    Group,
    Rollout,
    Rollouts,
    as_completion_batch,
    group_metrics,
    means,
    read_rollout,
    write_rollout,
)
from lilpipe.errors import ArtifactError
from lilpipe.generation.engine import CompletionOutput
from lilpipe.model.scores import IGNORED
from lilpipe.schemas.examples import Prompt
from tests.alignment.rollout.random_completions import random_completions

PROMPT = Prompt("p", "sort", "Sort the list 3 1.", "1 3")
CPU = torch.device("cpu")


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


def rollouts(directory, *, drawn, data_rank=0):
    def make(number):
        drawn.append(number)
        return Rollout(random_completions(seed=number), {"reward": (float(number), 1.0)})

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
    write_rollout(path, Rollout(random_completions(seed=1)))
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_rollout(path, Rollout(random_completions(seed=2)))
    assert path.read_bytes() == before
    assert read_rollout(path, CPU).metrics == {}
