"""Dropout of adapters: on their inputs alone, and the same wherever a sequence is computed."""

import pytest
import torch

from lilpipe.config.lora import LoRAConfig
from lilpipe.model.adapter_dropout import adapter_dropout, drop
from lilpipe.model.lora import adapted_layers
from lilpipe.training import activation_checkpointing, compilation
from tests.model.checkpoints import SMALL
from tests.model.test_lora import adapted

CONFIG = LoRAConfig(r=3, lora_dropout=0.4)
TOKENS = torch.arange(60).view(3, 20) * 7 % 200


def draws(sequences, *, step=0):
    return adapter_dropout(CONFIG, sequences, 0, step)


def rows(*ids):
    return torch.tensor(ids)[:, None].expand(-1, TOKENS.shape[1])


@pytest.fixture
def model():
    return adapted(CONFIG).train()


def test_without_dropout_the_model_gets_no_further_argument():
    assert adapter_dropout(None, None, 0, 0) == {}
    assert adapter_dropout(LoRAConfig(), None, 0, 0) == {}


def test_a_step_drops_the_same_again_and_another_step_does_not(model):
    first, second = (model(TOKENS, **draws(rows(0, 1, 2), step=step)) for step in range(2))
    assert torch.equal(model(TOKENS, **draws(rows(0, 1, 2))), first)
    assert (second - first).abs().max() > 0.1
    assert torch.equal(model.eval()(TOKENS), adapted(CONFIG)(TOKENS))


def test_nothing_but_the_adapters_inputs_is_dropped(model):
    for layer in adapted_layers(model):
        layer.lora_B.data.zero_()
    assert torch.equal(model(TOKENS, **draws(rows(0, 1, 2))), model.eval()(TOKENS))


def test_the_stated_share_is_dropped_in_each_layer_independently(model):
    seen = {}
    for layer in adapted_layers(model):
        layer.register_forward_pre_hook(lambda module, args: seen.update({module.name: args[0]}))
    model(TOKENS, **draws(rows(0, 1, 2)))
    kept = {}
    for layer in adapted_layers(model):
        ones = torch.ones_like(seen[layer.name])
        found = drop(ones, layer.numbers, 0.4, salt=layer.salt)
        assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
        kept[layer.name] = found != 0
    share = torch.cat([part.flatten() for part in kept.values()]).float().mean().item()
    assert share == pytest.approx(0.6, abs=0.01)
    same = [kept[f"model.layers.{a}.self_attn.{b}_proj"] for a, b in ((0, "q"), (0, "k"), (1, "q"))]
    for other in same[1:]:
        assert (same[0] == other).float().mean().item() == pytest.approx(0.6**2 + 0.4**2, abs=0.04)


def test_rows_drop_the_same_whichever_share_the_batch(model):
    whole = model(TOKENS, **draws(rows(4, 0, 9)))
    for row, number in enumerate((4, 0, 9)):
        alone = model(TOKENS[row : row + 1], **draws(rows(number)))
        torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-5, rtol=1e-5)


def test_a_packed_sequence_drops_what_it_does_alone(model):
    first, second = TOKENS[0, :12], TOKENS[1, :7]
    packed = torch.cat([first, second])[None]
    documents = torch.tensor([[0] * 12 + [1] * 7])
    ids = torch.tensor([[5] * 12 + [2] * 7])
    found = model(packed, documents_BT=documents, **draws(ids))
    for number, tokens, place in ((5, first, slice(0, 12)), (2, second, slice(12, 19))):
        alone = model(tokens[None], **draws(torch.full((1, len(tokens)), number)))
        torch.testing.assert_close(found[:, place], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_drop_the_same_though_another_micro_batch_was_computed_since(model, mode):
    def gradients(model):
        first, second = (model(TOKENS, **draws(rows(*ids))).sum() for ids in ((0, 1, 2), (3, 4, 5)))
        first.backward()  # as in a pipeline: after the forward pass of the second
        second.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    again = adapted(CONFIG).train()
    activation_checkpointing.apply(again, mode)
    found = gradients(again)
    assert len(found) == 2 * 7 * SMALL.num_layers
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def steps(model, optimizer, numbers):
    """Take these steps of training; gives their losses."""
    found = []
    for step in numbers:
        optimizer.zero_grad()
        loss = model(TOKENS, **draws(rows(0, 1, 2), step=step)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


SHORT = CONFIG.model_copy(update={"target_modules": ("q_proj",)})
"""Compiles quickly."""


def in_training(*, compiled):
    model = adapted(SHORT, SMALL.model_copy(update={"num_layers": 1})).train()
    if compiled:
        compilation.compile_blocks(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_compiled_blocks_drop_what_eager_ones_do_and_go_on_as_if_never_stopped():
    torch._dynamo.reset()
    eager, (whole, optimizer) = in_training(compiled=False), in_training(compiled=True)
    expected, found = steps(*eager, range(4)), steps(whole, optimizer, range(4))
    assert found == pytest.approx(expected, rel=1e-5)
    kept = in_training(compiled=False)[0].eval()(TOKENS).square().mean().item()
    assert kept != pytest.approx(expected[0], rel=1e-3)

    begun, begun_optimizer = in_training(compiled=True)
    steps(begun, begun_optimizer, range(2))
    resumed, resumed_optimizer = in_training(compiled=True)
    resumed.load_state_dict(begun.state_dict())
    resumed_optimizer.load_state_dict(begun_optimizer.state_dict())
    assert steps(resumed, resumed_optimizer, range(2, 4)) == found[2:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
