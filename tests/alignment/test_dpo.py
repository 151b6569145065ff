import math

import pytest
import torch
import torch.nn.functional as F

from lilpipe.alignment.dpo import PairLogprobs, dpo_loss, dpo_margin, encode_pair, pair_logprobs, run
from lilpipe.alignment.preferences import PAIR_SCHEMA, Pair
from lilpipe.alignment.tables import write_table
from lilpipe.config import DPOConfig, OptimizerConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import load_model
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import Message
from tests.alignment.conftest import as_artifact, digest_of

CONFIG = DPOConfig(seed=0, batch_size=4, num_epochs=3, checkpoint_every=2, log_every=1)


def pair(index, split="train"):
    prompt: list[Message] = [{"role": "user", "content": f"Copy {index}."}]
    return Pair(f"{split}/{index}", split, prompt, f"Answer: {index}", f"Sure, I can. Answer: {index}")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here; test_reports draws them."""
    monkeypatch.setattr("lilpipe.alignment.dpo.write_report", lambda *args, **options: None)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    directory = tmp_path_factory.mktemp("preferences")
    pairs = [*(pair(i) for i in range(12)), *(pair(i, "heldout") for i in range(20, 26))]
    write_table(directory / "pairs.arrow", [vars(item) for item in pairs], PAIR_SCHEMA)
    return as_artifact(directory, kind="Preferences")


def test_the_margin_compares_both_answers_with_the_reference():
    policy = PairLogprobs(torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([0.0]))
    assert dpo_margin(policy, torch.tensor([-4.0]), torch.tensor([-5.0])).tolist() == [3.0]


def test_the_loss_is_minus_log_sigmoid_of_beta_times_the_margin():
    losses = dpo_loss(torch.tensor([0.0, 10.0, -10.0]), beta=0.1)
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    assert losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mask_formatting_tokens", [True, False])
def test_log_probabilities_cover_the_answer_alone(tokenizer, make_checkpoint, mask_formatting_tokens):
    model, _ = load_model(make_checkpoint().path)
    pairs = [encode_pair(tokenizer, pair(i)) for i in (1, 234)]
    with torch.no_grad():
        got, num_tokens = pair_logprobs(
            model, pairs, padding_id=tokenizer.padding_id, mask_formatting_tokens=mask_formatting_tokens
        )
        for row, item in enumerate(pairs):
            for answer, total in ((item.chosen, got.chosen_N[row]), (item.rejected, got.rejected_N[row])):
                assert answer[-1] == tokenizer.turn_end_id
                assert item.prompt[-1] == tokenizer.assistant_id
                # One token at a time, without padding.
                logprobs = F.log_softmax(model(torch.tensor([item.prompt + answer]))[0], dim=-1)
                terms = [logprobs[len(item.prompt) + k - 1, token].item() for k, token in enumerate(answer)]
                expected = sum(terms[:-1]) if mask_formatting_tokens else sum(terms)
                assert total.item() == pytest.approx(expected, rel=1e-5)
                if answer is item.chosen:  # the likelihood term keeps the turn's end
                    assert got.chosen_mean_N[row].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert num_tokens == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def test_training_widens_the_margin_on_held_out_pairs(tmp_path, make_checkpoint, preferences):
    config = CONFIG.model_copy(update={"optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)})
    metrics = run(config, {"model": make_checkpoint(), "preferences": preferences}, Workspace(tmp_path))
    assert metrics["steps"] == 9
    assert metrics["heldout_preference_accuracy_before"] == 0.5
    assert metrics["heldout_margin_before"] == pytest.approx(0, abs=1e-4)
    assert metrics["heldout_preference_accuracy"] == 1
    assert metrics["heldout_margin"] > 1


def test_without_the_preference_loss_the_likelihood_term_alone_is_learnt(tmp_path, make_checkpoint, preferences):
    config = CONFIG.model_copy(update={"preference_coefficient": 0.0, "nll_coefficient": 1.0})
    workspace = Workspace(tmp_path)
    metrics = run(config, {"model": make_checkpoint(), "preferences": preferences}, workspace)
    assert metrics["heldout_chosen_change"] > 0


def test_a_falling_likelihood_of_chosen_answers_is_reported(tmp_path, make_checkpoint, preferences):
    optimizer = OptimizerConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0)
    config = CONFIG.model_copy(update={"nll_coefficient": 0.0, "beta": 1.0, "optimizer": optimizer})
    workspace = Workspace(tmp_path)
    metrics = run(config, {"model": make_checkpoint(), "preferences": preferences}, workspace)
    assert metrics["heldout_chosen_change"] < -1
    assert "the log-probability of held-out chosen answers fell by" in workspace.events.read_text()


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_killed_run_ends_in_the_bytes_of_an_uninterrupted_one(
    tmp_path, make_checkpoint, preferences, monkeypatch, killed_at
):
    inputs = {"model": make_checkpoint(), "preferences": preferences}
    run(CONFIG, inputs, Workspace(tmp_path / "whole"))
    killed = Workspace(tmp_path / "killed")
    progress = killed.progress

    def dying(done, total, unit="steps", **metrics):
        if unit == "steps" and done == killed_at:
            raise KeyboardInterrupt
        progress(done, total, unit, **metrics)

    monkeypatch.setattr(killed, "progress", dying)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, killed)
    run(CONFIG, inputs, Workspace(tmp_path / "killed"))
    assert digest_of(killed) == digest_of(Workspace(tmp_path / "whole"))


def test_too_few_pairs_for_a_batch_are_refused_with_numbers(tmp_path, make_checkpoint, preferences):
    with pytest.raises(DataError, match="got 12 pairs, expected at least one batch of 16"):
        run(
            CONFIG.model_copy(update={"batch_size": 16}),
            {"model": make_checkpoint(), "preferences": preferences},
            Workspace(tmp_path),
        )


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path, make_checkpoint, preferences):
    with pytest.raises(ConfigError, match="batch_size: got 4, expected a multiple of num_workers 3"):
        run(
            CONFIG.model_copy(update={"num_workers": 3}),
            {"model": make_checkpoint(), "preferences": preferences},
            Workspace(tmp_path),
        )
