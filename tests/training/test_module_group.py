from dataclasses import replace

import pytest
import torch
from torch import nn

from lilpipe.config.sft import SFTConfig
from lilpipe.stage import Workspace
from lilpipe.training.loop import train
from lilpipe.training.module_group import ModuleGroup
from lilpipe.training.replica import Replica
from tests.training import toy


def pair():
    """Two models that differ, so that neither may stand in for the other."""
    first, second = toy.ToyModel(), toy.ToyModel()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    return first, second


def tripled(model, step, micro):
    loss = toy.loss(model, step, micro)
    return replace(loss, total=3 * loss.total, num_tokens=0, metrics={"second": loss.metrics["accuracy"]})


def members(first, second):
    alone = {"first": (first, toy.loss), "second": (second, tripled)}
    return {name: Replica(model, loss, accumulation_steps=lambda _: 1) for name, (model, loss) in alone.items()}


def as_one(first, second):
    """The same as a single model whose loss is the sum."""

    def loss(models, step, micro):
        ours, theirs = toy.loss(models["first"], step, micro), tripled(models["second"], step, micro)
        return replace(ours, total=ours.total + theirs.total, metrics={**ours.metrics, **theirs.metrics})

    return Replica(nn.ModuleDict({"first": first, "second": second}), loss, accumulation_steps=lambda _: 1)


def run(trainer_module, root, **options):
    config = toy.optimizer(max_grad_norm=0.1)  # lower than the gradients', so that clipping is at work
    section = SFTConfig(seed=0, optimizer=config, checkpoint_every=4, log_every=1)
    return train(trainer_module, num_steps=8, workspace=Workspace(root), section=section, optimizer=config, **options)


def test_two_models_together_learn_what_one_model_made_of_both_learns(tmp_path):
    models, wanted = pair(), pair()
    result = run(ModuleGroup(members(*models)), tmp_path / "together")
    expected = run(as_one(*wanted), tmp_path / "one")
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    for model, other in zip(models, wanted, strict=True):
        torch.testing.assert_close(toy.weights(model), toy.weights(other), rtol=0, atol=1e-6)


def test_gradients_are_clipped_by_the_norm_of_both():
    together = ModuleGroup(members(*pair()))
    together.zero_grad()
    losses = together.forward_backward(0)
    parameters = [parameter for part in together.parts for parameter in part.parameters()]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
    count = losses[0].count
    assert together.reduce(count=count, max_norm=0.1) == pytest.approx(norm / count, rel=1e-5)
    for parameter, before in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, before * 0.1 / norm, rtol=1e-4, atol=1e-9)


def test_a_killed_run_of_two_models_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path):
    whole, killed = pair(), pair()
    run(ModuleGroup(members(*whole)), tmp_path / "whole")

    def dying(step):
        if step == 6:  # the last checkpoint is that of step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ModuleGroup(members(*killed)), tmp_path / "killed", before_step=dying)
    again = pair()
    run(ModuleGroup(members(*again)), tmp_path / "killed")
    for model, other in zip(again, whole, strict=True):
        assert torch.equal(toy.weights(model), toy.weights(other))
