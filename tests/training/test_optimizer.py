import copy

import pytest
import torch
from torch import nn

from lilpipe.config.model import ModelConfig, MoEConfig
from lilpipe.model.transformer import Transformer
from lilpipe.training.muon import Muon, orthogonalize
from lilpipe.training.optimizer import make_optimizers, named_state, split_parameters, take_step
from tests.training import toy

KINDS = ("adamw", "muon")


def names_of(model):
    """Names of the parameters of each group."""
    return [[name for name, _ in group] for group in split_parameters([model])]


def backward(model, number):
    model.zero_grad()
    loss = toy.loss(model, number, 0).total
    loss.backward()
    return loss.item()


def steps(model, optimizers, numbers):
    for number in numbers:
        backward(model, number)
        take_step(optimizers)


def test_embeddings_norms_biases_and_the_output_layer_are_told_from_matrices_of_the_blocks():
    blocks, matrices, rest = names_of(toy.ToyModel())
    assert blocks == ["hidden.weight", "wide.weight"]
    assert matrices == ["lm_head.weight"]
    assert rest == ["embed_tokens.weight", "hidden.bias", "norm.weight", "norm.bias"]


def test_experts_are_matrices_of_the_blocks_and_their_router_is_not():
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=0)
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, moe=moe, tie_embeddings=False)
    blocks, matrices, rest = names_of(Transformer(config, vocab_size=11))
    assert {name for name in blocks if ".experts." in name} == {
        f"model.layers.0.mlp.experts.{matrix}_proj" for matrix in ("gate", "up", "down")
    }
    assert sorted(matrices) == ["lm_head.weight", "model.layers.0.mlp.gate.weight"]
    assert "model.embed_tokens.weight" in rest


@pytest.mark.parametrize("kind", KINDS)
def test_decay_touches_matrices_alone(kind):
    model = toy.ToyModel()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    config = toy.optimizer(kind=kind, weight_decay=0.5, learning_rate=0.1, muon_learning_rate=0.2)
    take_step(make_optimizers(model, config), lr_scale=0.5)
    for name, parameter in model.named_parameters():
        rate = {"lm_head.weight": 0.1, "hidden.weight": 0.1, "wide.weight": 0.1}.get(name, 0.0)
        if kind == "muon" and name in ("hidden.weight", "wide.weight"):
            rate = 0.2
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * rate * 0.5))


def test_orthogonalized_matrices_keep_their_singular_vectors_and_lose_their_scale():
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ got @ vh.mT
    diagonal = torch.diagonal(inner, dim1=-2, dim2=-1)
    assert ((diagonal > 0.5) & (diagonal < 1.3)).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-10
    torch.testing.assert_close(orthogonalize(matrices * 1000), got)


def test_muon_agrees_with_torchs_up_to_the_rounding_of_bfloat16():
    generator = torch.Generator().manual_seed(2)
    shapes = [(16, 16), (8, 24), (24, 8), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        start = [parameter.detach().clone() for parameter in theirs]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
        for a, b, before in zip(ours, theirs, start, strict=True):
            assert (a - b).norm() < 0.06 * (b - before).norm()


def test_experts_are_updated_as_if_each_matrix_stood_alone():
    generator = torch.Generator().manual_seed(3)
    together = [nn.Parameter(torch.randn(5, *shape, generator=generator).double()) for shape in ((8, 12), (12, 8))]
    alone = [nn.Parameter(matrix.detach().clone()) for experts in together for matrix in experts]
    muons = [Muon(matrices, lr=0.02, weight_decay=0.1) for matrices in (together, alone)]
    for _ in range(3):
        grads = [torch.randn(experts.shape, generator=generator).double() for experts in together]
        for experts, grads_of_experts in zip(together, grads, strict=True):
            experts.grad = grads_of_experts
        for matrix, grad in zip(alone, [grad for experts in grads for grad in experts], strict=True):
            matrix.grad = grad.clone()
        for muon in muons:
            muon.step()
    got = [matrix for experts in together for matrix in experts]
    for matrix, expected in zip(got, alone, strict=True):
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_that_hold_parts_of_a_model_are_updated_as_the_whole(kind):
    config, model = toy.optimizer(kind=kind), toy.ToyModel(torch.float64)
    other = copy.deepcopy(model)
    parts = [nn.ModuleDict({name: module}) for name, module in other.named_children()]
    whole, of_parts = make_optimizers(model, config), make_optimizers(parts, config)
    steps(model, whole, range(3))
    steps(other, of_parts, range(3))
    assert (toy.weights(model) - toy.weights(other)).abs().max() < 1e-12
    assert named_state(of_parts).keys() == named_state(whole).keys()


def test_state_of_adamw_is_what_torchs_first_step_would_make():
    model = toy.ToyModel()
    other = copy.deepcopy(model)
    optimizers, others = make_optimizers(model, toy.optimizer()), make_optimizers(other, toy.optimizer())
    assert not any(tensor.any() for tensor in named_state(optimizers).values())
    others[0].state.clear()
    steps(model, optimizers, range(1))
    steps(other, others, range(1))
    state, expected = named_state(optimizers), named_state(others)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor, expected[name])
    assert torch.equal(toy.weights(model), toy.weights(other))


@pytest.mark.parametrize("kind", KINDS)
def test_state_copied_in_by_name_gives_the_same_next_step(kind):
    config, model = toy.optimizer(kind=kind), toy.ToyModel()
    optimizers = make_optimizers(model, config)
    steps(model, optimizers, range(3))
    other = copy.deepcopy(model)
    others = make_optimizers(other, config)
    for name, tensor in named_state(others).items():
        tensor.copy_(named_state(optimizers)[name])
    steps(model, optimizers, range(3, 6))
    steps(other, others, range(3, 6))
    assert torch.equal(toy.weights(model), toy.weights(other))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_give_the_same_next_step(kind):
    config, model = toy.optimizer(kind=kind), toy.ToyModel()
    optimizers = make_optimizers(model, config)
    steps(model, optimizers, range(3))
    other = copy.deepcopy(model)
    others = make_optimizers(other, config)
    for optimizer, loaded in zip(optimizers, others, strict=True):
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizers, range(3, 6))
    steps(other, others, range(3, 6))
    assert torch.equal(toy.weights(model), toy.weights(other))
    assert all(torch.equal(tensor, named_state(others)[name]) for name, tensor in named_state(optimizers).items())


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_scheduler_sets_the_learning_rates(kind):
    config, model = toy.optimizer(kind=kind, weight_decay=0.1), toy.ToyModel()
    other = copy.deepcopy(model)
    optimizers, others = make_optimizers(model, config), make_optimizers(other, config)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in others]
    for step in range(4):
        backward(model, step)
        take_step(optimizers, lr_scale=0.5**step)
        backward(other, step)
        for optimizer, scheduler in zip(others, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert torch.equal(toy.weights(model), toy.weights(other))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_after_each_step_and_profiles_name_the_optimizers(kind):
    model = toy.ToyModel()
    optimizers = make_optimizers(model, toy.optimizer(kind=kind))
    ended = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: ended.append(type(optimizer).__name__))
    with torch.profiler.profile() as profile:
        steps(model, optimizers, range(2))
    names = ["AdamW"] if kind == "adamw" else ["Muon", "AdamW"]
    assert ended == names * 2
    events = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.step#{name}.step" for name in names} <= events


def test_muon_takes_a_closure_and_leaves_matrices_without_gradients_alone():
    model, other = toy.ToyModel(), toy.ToyModel()
    muon = Muon([model.hidden.weight], lr=0.02, weight_decay=0.1)
    muon.add_param_group({"params": [model.wide.weight], "lr": 0.01})
    expected = [
        Muon([other.hidden.weight], lr=0.02, weight_decay=0.1),
        Muon([other.wide.weight], lr=0.01, weight_decay=0.1),
    ]
    loss = muon.step(lambda: backward(model, 0))
    assert loss == backward(other, 0)
    for optimizer in expected:
        optimizer.step()
    assert torch.equal(toy.weights(model), toy.weights(other))
    muon.zero_grad()
    muon.step()
    assert torch.equal(toy.weights(model), toy.weights(other))
