"""The decoder against a plain one written out here, and the properties that training and decoding rest on."""

import copy
import math

import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.errors import DataError
from lilpipe.model.flops import num_parameters, training_flops_per_token
from lilpipe.model.initial_weights import INIT_STD
from lilpipe.model.rope import apply_rope, rope_table
from lilpipe.model.transformer import Transformer, token_logprobs
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import OPTIONS

VOCAB = 50


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=VOCAB)


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=list(OPTIONS))
def any_model(request):
    return small_model(SMALL.model_copy(update=request.param), vocab_size=VOCAB)


def random_tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rotate(vector, position, theta):
    """RoPE of one head's vector, as complex numbers: pair (i, i + E/2) turns by position / theta**(2i/E)."""
    half = len(vector) // 2
    pairs = torch.complex(vector[:half].double(), vector[half:].double())
    turned = pairs * torch.exp(1j * position * theta ** (-2 * torch.arange(half).double() / len(vector)))
    return torch.cat([turned.real, turned.imag])


def naive_logits(model, tokens):
    """One row of tokens by loops over positions and heads, in float64."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.named_parameters()}
    E, group = config.head_size, config.num_heads // config.num_kv_heads

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        h = norm(x, f"{prefix}input_layernorm.weight")
        q, k, v = (h @ weights[f"{prefix}self_attn.{name}_proj.weight"].T for name in "qkv")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for head in range(config.num_heads):
                own = slice(head * E, head * E + E)
                shared = slice(head // group * E, head // group * E + E)
                query = rotate(q[t, own], t, config.rope_theta)
                scores = [query @ rotate(k[s, shared], s, config.rope_theta) / math.sqrt(E) for s in range(t + 1)]
                heads.append(torch.stack(scores).softmax(0) @ v[: t + 1, shared])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ weights[f"{prefix}self_attn.o_proj.weight"].T
        h = norm(x, f"{prefix}post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{prefix}mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4, "tie_embeddings": False}, {"norm_eps": 0.1}]
)
def test_logits_are_those_of_the_decoder_written_out_in_loops(changes):
    model = small_model(SMALL.model_copy(update=changes), vocab_size=VOCAB)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        logits = model(tokens)
    assert logits.dtype == torch.float32
    for row in range(2):
        torch.testing.assert_close(logits[row].double(), naive_logits(model, tokens[row]), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_decoder_written_out_in_loops():
    model = small_model(SMALL.model_copy(update={"num_layers": 1}), vocab_size=VOCAB).double()
    tokens = random_tokens(1, 5)
    parameters = dict(model.named_parameters())
    weight = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3)).double()
    got = torch.autograd.grad((model(tokens)[0] * weight).sum(), list(parameters.values()))
    expected = torch.autograd.grad((naive_logits(model, tokens[0]) * weight).sum(), list(parameters.values()))
    for name, mine, theirs in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_later_token_does_not_change_earlier_logits(any_model):
    tokens = random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % VOCAB
    with torch.no_grad():
        before, after = any_model(tokens)[0], any_model(changed)[0]
    torch.testing.assert_close(before[:12], after[:12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[12:], after[12:], atol=1e-3)


def test_documents_of_a_row_are_as_separate_sequences(any_model):
    first, second = random_tokens(1, 7, seed=1), random_tokens(1, 9, seed=2)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    row = torch.cat([first, second], dim=1)
    with torch.no_grad():
        packed = any_model(row, positions_BT=positions, documents_BT=documents)
        apart = torch.cat([any_model(first), any_model(second)], dim=1)
        mixed = any_model(row, positions_BT=positions)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, mixed, atol=1e-3)


def test_scores_are_the_log_softmax_of_the_logits(any_model):
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    targets[0, 3] = -100
    with torch.no_grad():
        logits, scores = any_model(tokens), any_model(tokens, targets_BT=targets)
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    torch.testing.assert_close(scores.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(any_model):
    tokens, targets = random_tokens(8, 60), random_tokens(8, 60, seed=1)  # enough for the least chosen expert
    names, parameters = zip(*any_model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(any_model(tokens, targets_BT=targets).logprobs.sum(), parameters)
    for name, gradient in zip(names, gradients, strict=True):
        parts = gradient if gradient.dim() == 3 else [gradient]  # of stacked experts, each
        assert all(part.any() for part in parts), name


@pytest.mark.parametrize("option", ["plain", "gpt2", "mla, moe"])
def test_blocks_of_one_kind_are_compiled_once(option):
    torch._dynamo.reset()
    any_model = small_model(SMALL.model_copy(update=OPTIONS[option]), vocab_size=VOCAB)
    model = copy.deepcopy(any_model).train()
    num_graphs = []

    def count(graph, _):
        num_graphs.append(graph)
        return graph

    for block in model.model.layers.values():
        block.compile(backend=count, fullgraph=True)
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    compiled = model(tokens, targets_BT=targets).logprobs
    assert len(num_graphs) == len({type(block.mlp) for block in model.model.layers.values()})
    torch.testing.assert_close(compiled, any_model(tokens, targets_BT=targets).logprobs)


def test_a_mask_of_documents_is_as_two_separate_sequences(model):
    first, second = random_tokens(1, 7, seed=1), random_tokens(1, 9, seed=2)
    document = torch.tensor([0] * 7 + [1] * 9)
    mask = (document[:, None] == document[None, :]) & torch.ones(16, 16, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), positions_BT=positions, mask=mask[None, None])
        apart = torch.cat([model(first), model(second)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_rope_depends_on_the_distance_alone():
    cos, sin = rope_table(64, 16, 10_000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)

    def score(i, j):
        turned = [
            apply_rope(x[None, None, None], cos[None, p, None, None], sin[None, p, None, None])
            for x, p in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(60, 57), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_token_logprobs_are_those_of_the_log_softmax(model):
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        expected = model(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(token_logprobs(model, tokens), expected, atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_the_model_takes_is_refused(model):
    with pytest.raises(DataError, match=r"sequence of 65 tokens: expected at most model\.max_seq_len = 64"):
        model(random_tokens(1, 65))


# --- weights ------------------------------------------------------------------------------------------------------


def test_fresh_weights_are_a_function_of_seed_and_name_alone():
    def weights(config, seed):
        model = Transformer(config, VOCAB)
        model.init_weights(seed)
        return model.state_dict()

    state = torch.get_rng_state()
    first = weights(SMALL, 1)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = weights(SMALL, 1), weights(SMALL, 2)
    untied = weights(SMALL.model_copy(update={"tie_embeddings": False}), 1)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(untied[name], tensor)
        assert tensor.dim() == 1 or not torch.equal(other[name], tensor)
    matrices = [tensor.flatten()[:100] for tensor in first.values() if tensor.dim() == 2]
    assert len(torch.unique(torch.stack(matrices), dim=0)) == len(matrices)


def test_fresh_weights_have_the_stated_spread():
    model = Transformer(ModelConfig(hidden_size=128, num_layers=8), 512)
    model.init_weights(0)
    weights = {name.removeprefix("model.layers.3."): tensor for name, tensor in model.state_dict().items()}
    assert weights["mlp.up_proj.weight"].std().item() == pytest.approx(INIT_STD, rel=0.05)
    assert weights["mlp.down_proj.weight"].std().item() == pytest.approx(INIT_STD / 4, rel=0.05)
    assert weights["self_attn.o_proj.weight"].std().item() == pytest.approx(INIT_STD / 4, rel=0.05)
    assert (weights["input_layernorm.weight"] == 1).all()


def test_a_fresh_model_predicts_close_to_uniformly():
    model = Transformer(SMALL, VOCAB)
    model.init_weights(0)
    with torch.no_grad():
        loss = -token_logprobs(model, random_tokens(4, 30)).mean()
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"num_kv_heads": 1, "num_layers": 5}])
def test_parameters_are_counted_as_torch_counts_them(changes):
    config = SMALL.model_copy(update=changes)
    counted = sum(parameter.numel() for parameter in Transformer(config, VOCAB).parameters())
    assert num_parameters(config, VOCAB) == counted


def test_training_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = SMALL.model_copy(update={"num_kv_heads": SMALL.num_heads})
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(2, 16)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counts.items() if "attention" not in str(name))
    stated = training_flops_per_token(config, VOCAB, seq_len=16)
    attention = 12 * config.num_layers * config.hidden_size * 16
    assert products == 32 * (stated - attention)
