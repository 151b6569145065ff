"""Dropout draws by place: independent of how rows are grouped, of recomputation and of the compiler."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lilpipe.model.dropout import dropout, layer_numbers, token_numbers
from tests.model.checkpoints import SMALL, small_model

VOCAB = 50
TOKENS = torch.randint(0, VOCAB, (4, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return small_model(SMALL.model_copy(update={"dropout": 0.25}), vocab_size=VOCAB).train()


def draws(seed=1, *, num_rows=8, num_tokens=64, width=128, rate=0.25, layer=0, place=0, documents=None):
    """What dropout leaves of ones."""
    numbers = token_numbers(seed, torch.arange(num_rows), documents, torch.arange(num_tokens)[None])
    x = torch.ones(num_rows, num_tokens, width)
    return dropout(x, layer_numbers(numbers, layer)[place], rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_stated_share_is_dropped_and_the_rest_scaled_up(rate):
    left = draws(rate=rate)
    assert (left == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(left[left != 0], torch.full_like(left[left != 0], 1 / (1 - rate)))


def test_draws_of_different_places_are_independent():
    kept = draws(rate=0.5) != 0
    others = [draws(2, rate=0.5), draws(rate=0.5, layer=1), draws(rate=0.5, place=1)]
    others += [draws(rate=0.5).roll(1, dims) for dims in range(3)]
    others.append(draws(rate=0.5, documents=torch.ones(8, 64, dtype=torch.int64)))
    for other in others:  # 65,536 draws: the share that agrees has a standard deviation of 0.002
        assert (kept == (other != 0)).float().mean().item() == pytest.approx(0.5, abs=0.01)
    for dims in ((0, 1), (1, 2), (0, 2)):  # every element, token and row is dropped about as often as others
        shares = kept.float().mean(dims)
        deviation = 0.5 / (kept.numel() / shares.numel()) ** 0.5
        assert (shares - 0.5).abs().max() < 5 * deviation


def test_a_step_draws_the_same_again_and_another_step_does_not(model):
    state = torch.get_rng_state()
    losses = []
    for seed in ((7, 0), (7, 1), (7, 0)):
        model.set_dropout_seed(*seed)
        losses.append(model(TOKENS).sum().item())
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_draw_the_same_whichever_share_the_batch(model):
    model.set_dropout_seed(0)
    whole = model(TOKENS)
    parts = [model(TOKENS[rows], rows_B=rows) for rows in torch.arange(4).split(2)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(TOKENS[2:]), whole[2:], atol=1e-3)


def test_a_stage_of_a_pipeline_draws_what_the_whole_model_does(model):
    model.set_dropout_seed(0)
    hidden = []
    for block in model.model.layers.values():
        block.register_forward_hook(lambda _, args, output: hidden.append((args[0], output[0])))
    model(TOKENS)
    alone = type(model)(model.config, VOCAB, type(model.part)(range(1, 2), first=False, last=False)).train()
    alone.load_state_dict({n: t for n, t in model.state_dict().items() if n.startswith("model.layers.1.")})
    alone.set_dropout_seed(0)
    assert torch.equal(alone(hidden[1][0]), hidden[1][1])


def test_each_layer_draws_for_itself(model):
    model.set_dropout_seed(0)
    draws = []
    for block in model.model.layers.values():
        block.register_forward_pre_hook(lambda _, args: draws.append(args[-1]))
    model(TOKENS)
    assert len(torch.unique(torch.stack(draws).flatten(0, 1).flatten(1), dim=0)) == 2 * SMALL.num_layers


def test_recomputed_blocks_drop_the_same(model):
    model.set_dropout_seed(0)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(TOKENS).logsumexp(-1).sum(), parameters)
    for block in model.model.layers.values():
        block.forward = lambda *args, inner=block.forward: checkpoint(inner, *args, use_reentrant=False)
    got = torch.autograd.grad(model(TOKENS).logsumexp(-1).sum(), parameters)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_compiled_blocks_drop_the_same_in_one_graph(model):
    torch._dynamo.reset()
    model.set_dropout_seed(0)
    expected = model(TOKENS)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    for block in model.model.layers.values():
        block.compile(backend=count, fullgraph=True)
    torch.testing.assert_close(model(TOKENS), expected)
    model.set_dropout_seed(1)
    model(TOKENS)
    assert len(graphs) == 1


def test_nothing_is_dropped_in_evaluation(model):
    plain = small_model(vocab_size=VOCAB)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), plain(TOKENS))


def test_training_without_a_seed_is_refused(model):
    with pytest.raises(AssertionError, match="set_dropout_seed"):
        model(TOKENS)
