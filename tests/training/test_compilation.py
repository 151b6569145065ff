import copy

import torch
from torch._dynamo.utils import counters

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.model.transformer import Transformer
from lilpipe.training import compilation

MODEL = ModelConfig(hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1, intermediate_size=64, max_seq_len=16)


def gradients(model, tokens):
    model.zero_grad()
    loss = -model(tokens[:, :-1], targets_BT=tokens[:, 1:]).logprobs.sum()
    loss.backward()
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


def test_compiled_blocks_compute_the_same_and_share_one_graph():
    eager = Transformer(MODEL, 50)
    eager.init_weights(0)
    compiled = copy.deepcopy(eager)
    compilation.compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    counters.clear()
    expected, wanted = gradients(eager, tokens)
    loss, found = gradients(compiled, tokens)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    assert counters["stats"]["unique_graphs"] == 1
    again, found_again = gradients(compiled, tokens)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, found, found_again))


def test_long_runs_are_compiled_unless_the_configuration_says_otherwise():
    short = PretrainConfig(model=MODEL, num_steps=10)
    long = PretrainConfig(num_steps=100_000)
    assert not compilation.is_wanted(short, 50)
    assert compilation.is_wanted(long, 4096)
    assert compilation.is_wanted(short.model_copy(update={"compile": True}), 50)
    assert not compilation.is_wanted(long.model_copy(update={"compile": False}), 4096)
