import copy

import pytest
import torch
from torch import nn

from lilpipe.training.muon import Muon, orthogonalize
from lilpipe.training.optimizer import Optimizer, split_parameters
from tests.training import toy


def test_embeddings_norms_biases_and_the_output_layer_are_told_from_matrices_of_the_blocks():
    model = toy.ToyModel()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks, matrices, rest = ([names[id(p)] for p in group] for group in split_parameters([model]))
    assert blocks == ["hidden.weight", "wide.weight"]
    assert matrices == ["lm_head.weight"]
    assert rest == ["embed_tokens.weight", "hidden.bias", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_taken_over_by_name_gives_the_same_next_step(kind):
    def steps(model, optimizer, numbers):
        for number in numbers:
            model.zero_grad()
            toy.loss(model, number, 0).total.backward()
            optimizer.step(1.0)

    config = toy.optimizer(kind=kind)
    model = toy.ToyModel()
    optimizer = Optimizer(model, config)
    steps(model, optimizer, range(3))
    other = copy.deepcopy(model)
    other_optimizer = Optimizer(other, config)
    other_optimizer.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    steps(model, optimizer, range(3, 6))
    steps(other, other_optimizer, range(3, 6))
    assert torch.equal(toy.weights(model), toy.weights(other))
