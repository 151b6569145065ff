"""The mixture of experts against transformers' DeepSeek-V3 and a loop over tokens, and its balancing."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from lilpipe.model import moe
from lilpipe.model.grouped import grouped_linear
from lilpipe.model.transformer import Transformer
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import SMALL_MOE

VOCAB = 50
CONFIG = SMALL.model_copy(update={"moe": SMALL_MOE})
D = SMALL.hidden_size


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_layer(**changes):
    layer = moe.MoE(D, SMALL_MOE.model_copy(update=changes))
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = 0.4 * random(*parameter.shape, seed=seed)
    assert layer.gate.e_score_correction_bias is not None
    layer.gate.e_score_correction_bias.copy_(0.3 * random(SMALL_MOE.num_experts, seed=99))
    return layer


def written_out(layer, x_ND, top_k, scale):
    """Token by token, expert by expert."""
    experts, shared, rows = layer.experts, layer.shared_experts, []
    for x in x_ND:
        affinity = torch.sigmoid(layer.gate.weight @ x)
        ranked = sorted(range(len(affinity)), key=lambda e: -(affinity[e] + layer.gate.e_score_correction_bias[e]))
        chosen = ranked[:top_k]
        row = shared(x)
        for e in chosen:
            y = experts.down_proj[e] @ (F.silu(experts.gate_proj[e] @ x) * (experts.up_proj[e] @ x))
            row = row + scale * affinity[e] / sum(affinity[c] for c in chosen) * y
        rows.append(row)
    return torch.stack(rows)


def test_outputs_and_gradients_are_those_of_a_loop_over_tokens():
    layer = small_layer().double()
    x = random(2, 13, D).double().requires_grad_()
    weight = random(26, D, seed=1).double()
    ours, loads = layer(x)
    theirs = written_out(layer, x.flatten(0, 1), SMALL_MOE.num_experts_per_tok, SMALL_MOE.routed_scaling_factor)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-12, rtol=1e-12)
    assert loads.sum() == 26 * SMALL_MOE.num_experts_per_tok
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((ours.flatten(0, 1) * weight).sum(), inputs)
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_outputs_and_gradients_are_those_of_transformers():
    layer = small_layer()
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=SMALL_MOE.moe_intermediate_size,
        n_routed_experts=SMALL_MOE.num_experts,
        num_experts_per_tok=SMALL_MOE.num_experts_per_tok,
        n_shared_experts=SMALL_MOE.n_shared_experts,
        routed_scaling_factor=SMALL_MOE.routed_scaling_factor,
        n_group=1,
        topk_group=1,
    )
    config._experts_implementation = "eager"
    peer = DeepseekV3MoE(config)
    weights = dict(layer.state_dict())
    parts = [weights.pop(f"experts.{part}_proj") for part in ("gate", "up")]
    peer.load_state_dict({**weights, "experts.gate_up_proj": torch.cat(parts, dim=1)})
    x = random(2, 13, D).requires_grad_()
    ours, theirs = layer(x)[0], peer(x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = random(*ours.shape, seed=1)
    names = ["gate.weight", "experts.down_proj", "shared_experts.up_proj.weight"]
    for model, y in ((layer, ours), (peer, theirs)):
        (y * weight).sum().backward(inputs=[model.get_parameter(name) for name in names])
    for name in names:
        mine, other = layer.get_parameter(name).grad, peer.get_parameter(name).grad
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_grouped_products_are_those_of_each_group_also_of_an_empty_one(dtype, tolerance):
    ends = torch.tensor([3, 3, 10, 12])
    x = random(12, 8).to(dtype).requires_grad_()
    weight = random(4, 16, 8, seed=1).to(dtype).requires_grad_()
    ours = grouped_linear(x, weight, ends)
    theirs = torch.cat([x[:3] @ weight[0].T, x[3:10] @ weight[2].T, x[10:] @ weight[3].T])
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    sums = [torch.autograd.grad((y * random(12, 16, seed=2)).sum(), [x, weight]) for y in (ours, theirs)]
    for mine, other in zip(*sums, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
    assert not sums[0][1][1].any()


def test_experts_compute_in_bfloat16_under_autocast_and_the_router_does_not():
    layer = small_layer()
    x = random(2, 13, D)
    with torch.no_grad():
        exact, loads = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough, same_loads = layer(x)
    assert torch.equal(loads, same_loads)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


# --- balancing ----------------------------------------------------------------------------------------------------


def tokens_and_targets():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (2, 4, 30), generator=generator)


def test_a_step_counts_each_token_once_also_where_blocks_are_recomputed():
    model = small_model(CONFIG, vocab_size=VOCAB).train()
    tokens, targets = tokens_and_targets()

    def loads(run):
        run()
        counted = dict(model.model.expert_loads)
        model.balance_experts(lambda loads_LE: loads_LE)
        return counted

    def plain():
        model(tokens, targets_BT=targets).logprobs.sum().backward()

    bias_rate_zero = SMALL_MOE.model_copy(update={"bias_update_rate": 0.0})
    model.config = CONFIG.model_copy(update={"moe": bias_rate_zero})
    expected = loads(plain)
    assert set(expected) == {"1", "2"}
    assert all(load.sum() == tokens.numel() * SMALL_MOE.num_experts_per_tok for load in expected.values())
    for block in model.model.layers.values():
        block.forward = lambda *args, inner=block.forward: checkpoint(inner, *args, use_reentrant=False)
    recomputed = loads(plain)
    assert all(torch.equal(recomputed[layer], load) for layer, load in expected.items())


def test_an_evaluation_does_not_count():
    model = small_model(CONFIG, vocab_size=VOCAB).eval()
    model(tokens_and_targets()[0])
    assert model.balance_experts(lambda loads_LE: loads_LE) == {}


def test_biases_move_against_the_loads_summed_over_workers():
    model = small_model(CONFIG, vocab_size=VOCAB)
    for layer in (1, 2):
        model.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias").zero_()
    model.model.expert_loads = {"1": torch.tensor([5, 5, 5, 5, 5, 5]), "2": torch.tensor([12, 0, 6, 6, 6, 6])}
    got = model.balance_experts(lambda loads_LE: loads_LE + torch.tensor([[0] * 6, [6, 0, 0, 0, 0, 0]]))
    assert got == {1: 1.0, 2: pytest.approx(18 / 7)}
    assert not model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").any()
    assert model.get_buffer("model.layers.2.mlp.gate.e_score_correction_bias").tolist() == pytest.approx(
        [-1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    )
    assert model.balance_experts(lambda loads_LE: loads_LE) == {}


def test_a_planted_skew_shrinks():
    config = CONFIG.model_copy(update={"moe": SMALL_MOE.model_copy(update={"bias_update_rate": 0.02})})
    model = small_model(config, vocab_size=VOCAB).train()
    tokens, _ = tokens_and_targets()
    for layer in (1, 2):
        model.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias").copy_(torch.eye(6)[0])
    imbalances = []
    with torch.no_grad():
        for _ in range(80):
            model(tokens)
            imbalances.append(max(model.balance_experts(lambda loads_LE: loads_LE).values()))
    assert imbalances[0] >= 2.9  # every token goes to expert 0, which is half of all choices: 6 x 1/2
    assert max(imbalances[-5:]) < 1.5


def test_the_bias_is_saved_and_starts_at_zero():
    model = Transformer(CONFIG, VOCAB)
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").fill_(3.0)
    model.init_weights(0)
    state = model.state_dict()
    assert [name for name in state if name.endswith("e_score_correction_bias")] == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)
    ]
    assert not state["model.layers.1.mlp.gate.e_score_correction_bias"].any()
    assert state["model.layers.1.mlp.experts.up_proj"].std().item() == pytest.approx(0.02, rel=0.05)


# --- names --------------------------------------------------------------------------------------------------------


def test_experts_are_apart_in_hugging_face_s_names():
    state = small_model(CONFIG, vocab_size=VOCAB).state_dict()
    apart = moe.to_huggingface(state)
    name = "model.layers.2.mlp.experts"
    assert torch.equal(apart[f"{name}.5.down_proj.weight"], state[f"{name}.down_proj"][5])
    assert f"{name}.down_proj" not in apart
    assert "model.layers.2.mlp.shared_experts.down_proj.weight" in apart
    again = moe.from_huggingface(dict(reversed(apart.items())))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
