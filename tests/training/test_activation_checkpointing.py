import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.model.transformer import Transformer
from lilpipe.training import activation_checkpointing

SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "max_seq_len": 32,
}


def trained_step(mode, **options):
    """Loss, gradients by name, and bytes that the forward pass kept."""
    model = Transformer(ModelConfig.model_validate({**SHAPE, **options}), 50)
    model.init_weights(0)
    activation_checkpointing.apply(model, mode)
    model.set_dropout_seed(0, 0)
    tokens = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -model(tokens[:, :-1], targets_BT=tokens[:, 1:]).logprobs.sum()
    loss.backward()
    return (
        loss,
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.2}, {"moe": {"num_experts": 4, "moe_intermediate_size": 16}}], ids=str
)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_same_bits_with_less_memory(mode, options):
    loss, gradients, kept = trained_step("none", **options)
    again, gradients_again, kept_again = trained_step(mode, **options)
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    if mode == "full":
        assert kept_again < kept


def test_names_stay():
    model = Transformer(ModelConfig.model_validate(SHAPE), 50)
    names = list(model.state_dict())
    activation_checkpointing.apply(model, "full")
    assert list(model.state_dict()) == names
