import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lilpipe.errors import ConfigError, DataError
from lilpipe.training.checkpoint import Checkpoints
from lilpipe.training.replica import Loss
from tests.training import toy


def plain_adamw_loop(num_steps, config):
    """The same training in torch's own words: mean loss, clip_grad_norm_, LambdaLR, unfused AdamW."""
    model = toy.ToyModel(torch.float64)
    decayed = ("hidden.weight", "wide.weight", "lm_head.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=False)
    rates = torch.optim.lr_scheduler.LambdaLR(adamw, lambda s: min(1.0, (s + 1) / 4) if s < 3 else 1.0)
    losses = []
    for step in range(num_steps):
        inputs, targets = toy.batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        adamw.step()
        rates.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_training_is_what_torchs_adamw_does_in_a_plain_loop(tmp_path, max_grad_norm):
    config = toy.optimizer(schedule="constant", max_grad_norm=max_grad_norm)
    model, result = toy.run(tmp_path, num_steps=15, dtype=torch.float64, config=config)
    expected, losses = plain_adamw_loop(15, config)
    assert result.losses == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(toy.weights(model), toy.weights(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_learns(tmp_path, kind):
    _, result = toy.run(tmp_path, num_steps=150, config=toy.optimizer(kind=kind))
    assert result.final_loss(10) < 0.5 * result.losses[0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_accumulation_changes_nothing(tmp_path, kind):
    config = toy.optimizer(kind=kind)
    options = {"num_steps": 10, "dtype": torch.float64, "config": config}
    whole, result = toy.run(tmp_path / "whole", **options)
    split, split_result = toy.run(
        tmp_path / "split", loss=partial(toy.loss, accumulation_steps=4), accumulation_steps=4, **options
    )
    assert split_result.losses == pytest.approx(result.losses, abs=1e-12)
    torch.testing.assert_close(toy.weights(split), toy.weights(whole), rtol=0, atol=1e-8)
    assert split_result.num_tokens == result.num_tokens == 10 * 40


# --- bad numbers --------------------------------------------------------------------------------------------------


def planted(fault, at_step):
    def loss(model, step, micro):
        good = toy.loss(model, step, micro)
        return Loss(fault(good.total), good.count, good.num_tokens) if step == at_step else good

    return loss


@pytest.mark.parametrize(
    "fault",
    [
        lambda total: total * float("nan"),
        lambda total: total * float("inf"),
        lambda total: total + ((total - total) ** 0.5).sum() * 0,  # finite loss, gradient NaN
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_naming_the_step(tmp_path, fault):
    with pytest.raises(ConfigError, match=r"step 7: .*lower optimizer.learning_rate"):
        toy.run(tmp_path, loss=planted(fault, at_step=6))
    saved = tmp_path / "scratch" / "checkpoints" / "step-00000004"
    assert saved == max(saved.parent.glob("step-*"))
    tensors = {name: tensor for path in saved.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {name.partition("/")[0] for name in tensors} == {"model", "optimizer", "record"}
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if not name.startswith("record"))


def test_a_batch_with_nothing_to_learn_from_is_named(tmp_path):
    def loss(model, step, micro):
        return Loss(toy.loss(model, step, micro).total * 0, 0, 40)

    with pytest.raises(DataError, match=r"step 1: .*a batch without targets"):
        toy.run(tmp_path, loss=loss)


# --- what is recorded ---------------------------------------------------------------------------------------------


def events(root):
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def test_progress_holds_means_since_the_last_report(tmp_path):
    config = toy.optimizer(schedule="linear")
    _, result = toy.run(tmp_path, num_steps=12, config=config)
    lines = events(tmp_path)
    assert [line["done"] for line in lines] == [5, 10, 12]
    assert all(line["total"] == 12 and line["unit"] == "steps" for line in lines)
    assert lines[1]["metrics"]["loss"] == pytest.approx(sum(result.losses[5:10]) / 5)
    assert lines[2]["metrics"]["lr"] == pytest.approx(0.01 * (1 - 8 / 9))
    assert set(lines[0]["metrics"]) == {"loss", "lr", "grad_norm", "tokens_per_second", "accuracy", "goodput"}


def test_evaluation_runs_at_its_interval_and_at_the_end_without_gradients(tmp_path):
    seen = []

    def evaluate(replica, done):
        seen.append((done, torch.is_inference_mode_enabled(), replica.model.training))
        return {"quality": float(done)}

    _, result = toy.run(tmp_path, num_steps=12, evaluate=evaluate, eval_every=6)
    assert seen == [(6, True, False), (12, True, False)]
    assert result.metrics == {"quality": 12.0}
    assert [e["metrics"]["quality"] for e in events(tmp_path) if "quality" in e["metrics"]] == [6.0, 12.0]


# --- resuming -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_interrupted_at_any_step_ends_in_the_same_bits(tmp_path, kind):
    config = toy.optimizer(kind=kind)
    expected, result = toy.run(tmp_path / "whole", config=config)

    def dying(at_step):
        def loss(model, step, micro):
            if step == at_step:
                raise Killed
            return toy.loss(model, step, micro)

        return loss

    for at_step in (0, 3, 4, 5, 11, 19):
        with pytest.raises(Killed):
            toy.run(tmp_path / "cut", loss=dying(at_step), config=config)
    model, resumed = toy.run(tmp_path / "cut", config=config)
    assert torch.equal(toy.weights(model), toy.weights(expected))
    assert resumed.losses == result.losses
    assert resumed.num_tokens == result.num_tokens


def test_a_finished_run_called_again_takes_no_step(tmp_path):
    expected, result = toy.run(tmp_path)
    model, again = toy.run(tmp_path, loss=planted(lambda total: pytest.fail("took a step"), at_step=19))
    assert torch.equal(toy.weights(model), toy.weights(expected))
    assert again.losses == result.losses


def test_a_damaged_last_checkpoint_costs_steps_and_no_bits(tmp_path):
    expected, _ = toy.run(tmp_path / "whole")
    toy.run(tmp_path / "cut")
    last = next(max((tmp_path / "cut" / "scratch" / "checkpoints").glob("step-*")).glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    model, _ = toy.run(tmp_path / "cut")
    assert torch.equal(toy.weights(model), toy.weights(expected))
    messages = [event["message"] for event in events(tmp_path / "cut") if "message" in event]
    assert any("step-00000020 cannot be resumed" in message for message in messages)
    assert any("after step 16" in message for message in messages)


def test_a_process_killed_at_each_write_ends_in_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["signals"].count(-signal.SIGKILL) >= 8
    assert len(set(report["digests"])) == 1
    assert len(report["digests"]) == 2


def test_an_error_leaves_a_run_only_after_the_save_under_way_has_ended(tmp_path, monkeypatch):
    write = Checkpoints._write

    def slow(*arguments):
        time.sleep(0.3)
        write(*arguments)

    def dying(model, step, micro):
        if step == 4:
            raise Killed
        return toy.loss(model, step, micro)

    monkeypatch.setattr(Checkpoints, "_write", slow)
    with pytest.raises(Killed):
        toy.run(tmp_path, loss=dying)
    assert (tmp_path / "scratch" / "checkpoints" / "LATEST").read_text() == "step-00000004"
