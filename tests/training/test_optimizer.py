import copy

import pytest
import torch
from torch import nn

from lilpipe.config.model import ModelConfig, MoEConfig
from lilpipe.model.transformer import Transformer
from lilpipe.training.muon import Muon, orthogonalize
from lilpipe.training.optimizer import Optimizer, split_parameters
from tests.training import toy

KINDS = ("adamw", "muon")


def names_of(model):
    """Names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group] for group in split_parameters([model])]


def steps(model, optimizer, numbers):
    for number in numbers:
        model.zero_grad()
        toy.loss(model, number, 0).total.backward()
        optimizer.step(1.0)


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
    Optimizer(model, config).step(lr_scale=0.5)
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
    muon = Muon(ours, learning_rate=0.02, weight_decay=0.1)
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
    muons = [Muon(matrices, learning_rate=0.02, weight_decay=0.1) for matrices in (together, alone)]
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
    whole, of_parts = Optimizer(model, config), Optimizer(parts, config)
    steps(model, whole, range(3))
    steps(other, of_parts, range(3))
    assert (toy.weights(model) - toy.weights(other)).abs().max() < 1e-12
    assert of_parts.state().keys() == whole.state().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_state_made_before_the_first_step_is_what_the_first_step_would_make(kind):
    config, model = toy.optimizer(kind=kind), toy.ToyModel()
    other = copy.deepcopy(model)
    optimizer, other_optimizer = Optimizer(model, config), Optimizer(other, config)
    other_optimizer.init_state()
    assert all(not tensor.any() for tensor in other_optimizer.state().values())
    steps(model, optimizer, range(1))
    steps(other, other_optimizer, range(1))
    state, other_state = optimizer.state(), other_optimizer.state()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (other_state[name].dtype, other_state[name].shape)
        assert torch.equal(tensor, other_state[name])
    assert torch.equal(toy.weights(model), toy.weights(other))


@pytest.mark.parametrize("kind", KINDS)
def test_state_copied_in_by_name_gives_the_same_next_step(kind):
    config, model = toy.optimizer(kind=kind), toy.ToyModel()
    optimizer = Optimizer(model, config)
    steps(model, optimizer, range(3))
    other = copy.deepcopy(model)
    other_optimizer = Optimizer(other, config)
    other_optimizer.init_state()
    for name, tensor in other_optimizer.state().items():
        tensor.copy_(optimizer.state()[name])
    steps(model, optimizer, range(3, 6))
    steps(other, other_optimizer, range(3, 6))
    assert torch.equal(toy.weights(model), toy.weights(other))
