"""GPT-2 against transformers', and its weights between the two layouts."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import generate
from lilpipe.model import gpt2
from lilpipe.model.initial_weights import INIT_STD
from lilpipe.model.transformer import Transformer
from tests.model.checkpoints import SMALL, small_model
from tests.model.options import OPTIONS

VOCAB = 50
CONFIG = SMALL.model_copy(update=OPTIONS["gpt2"])


@pytest.fixture(scope="module")
def peer():
    """The peer, with weights so large that a wrong layout shows."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONFIG.max_seq_len,
        n_embd=CONFIG.hidden_size,
        n_layer=CONFIG.num_layers,
        n_head=CONFIG.num_heads,
        n_inner=CONFIG.intermediate_size,
        layer_norm_epsilon=CONFIG.norm_eps,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model


def imported(state):
    model = Transformer(CONFIG, VOCAB).eval()
    weights = gpt2.from_huggingface(state)
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def model(peer):
    return imported(peer.state_dict())


def test_logits_and_gradients_are_those_of_transformers(peer, model):
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    mine, theirs = model(tokens), peer(tokens).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    peer.zero_grad()
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    expected = gpt2.from_huggingface({name: tensor.grad for name, tensor in peer.named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=1e-4)


def test_answers_are_those_of_transformers(peer, model):
    prompt = [3, 14, 15, 9, 26]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=20, batch_size=2)
    answers = generate(model, [prompt, prompt[:2]], sampling=sampling, stop_ids=[], seed=0)
    for start, answer in zip([prompt, prompt[:2]], answers, strict=True):
        theirs = peer.generate(torch.tensor([start]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert answer[0].tokens == theirs[0, len(start) :].tolist()


def test_openai_s_files_have_names_without_prefix_and_masks_beside_the_weights(peer, model):
    state = {name.removeprefix("transformer."): tensor for name, tensor in peer.state_dict().items()}
    state.pop("lm_head.weight")
    for layer in range(CONFIG.num_layers):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    weights = imported(state).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_go_out_as_they_came_in(peer, model):
    state = peer.state_dict()
    state.pop("lm_head.weight")
    out = gpt2.to_huggingface(model.state_dict())
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())


def test_a_name_that_is_not_known_is_kept_for_the_reader_to_refuse():
    assert list(gpt2.from_huggingface({"transformer.h.0.attn.rotary": torch.ones(1)})) == ["model.layers.0.attn.rotary"]


def test_fresh_weights_are_gpt2_s():
    model = Transformer(CONFIG.model_copy(update={"hidden_size": 128, "intermediate_size": 512}), 500)
    model.init_weights(0)
    weights = model.state_dict()
    assert weights["model.embed_positions.weight"].std().item() == pytest.approx(INIT_STD, rel=0.05)
    assert weights["model.layers.1.self_attn.q_proj.weight"].std().item() == pytest.approx(INIT_STD, rel=0.05)
    residual = INIT_STD / (2 * CONFIG.num_layers) ** 0.5
    assert weights["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(residual, rel=0.05)
    assert not any(tensor.any() for name, tensor in weights.items() if name.endswith("bias"))
    assert (weights["model.norm.weight"] == 1).all()


def test_small_models_of_tests_use_their_biases():
    model = small_model(CONFIG, vocab_size=VOCAB)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        before = model(tokens)
        model.get_parameter("model.layers.1.mlp.up_proj.bias").zero_()
        assert not torch.allclose(before, model(tokens), atol=1e-3)
