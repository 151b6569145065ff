import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError
from lilpipe.model.transformer import Transformer
from lilpipe.training import precision

CPU = torch.device("cpu")


def test_bf16_multiplies_in_bfloat16_and_keeps_float32_gradients_and_scores():
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
    model = Transformer(ModelConfig.model_validate({**shape, "max_seq_len": 16}), 50)
    model.init_weights(0)
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in ("fp32", "bf16"):
        model.zero_grad()
        seen = []
        matrix = model.get_submodule("model.layers.0.mlp.up_proj")
        hook = matrix.register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
        with precision.autocast(kind, CPU):
            scores = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        hook.remove()
        assert seen[0].dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
        assert scores.logprobs.dtype == torch.float32
        (-scores.logprobs.sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found[kind] = torch.cat([gradient.flatten() for gradient in gradients])
    difference = (found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < difference < 0.02


def test_fp8_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="fp8 requires an Ada or Hopper GPU, got a CPU; use bf16"):
        precision.check(PretrainConfig(precision="fp8"), CPU)
    precision.check(PretrainConfig(precision="bf16"), CPU)
